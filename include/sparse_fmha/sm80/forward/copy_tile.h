// Asynchronous copies of rows to shared memory.
#pragma once

#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

// Rows of a sequence that start at a token.
template <class Element>
struct TokenRows {
  Element const* base;  // of token 0
  int64_t stride;
  int32_t first;
  int32_t length;
  __device__ __forceinline__ Element const* operator()(int r) const {
    int32_t const token = first + r;
    return token < length ? base + token * stride : nullptr;
  }
};

// Copies kRows rows of a head to a swizzled tile. rows(r) is the address of the r-th row, or
// nullptr if there is none: it is then zero, as columns from `head_dim` are. `legal` is an address
// that can be read. Called by all threads; returns with the copies in flight, not yet committed.
template <class Traits, int kRows, class Element, class Rows>
__device__ __forceinline__ void copy_tile(Element* to, Rows const& rows, Element const* legal,
                                          int32_t head_dim) {
  constexpr int kChunks = Traits::kRowDim / 8;
  constexpr int kRowsAtOnce = Traits::kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0, "whole passes of 16-byte chunks");
  int const chunk = threadIdx.x % kChunks;
  int const first = threadIdx.x / kChunks;
  if (chunk * 8 >= Traits::kHeadDim) {
    return;  // columns that only round up the row are never read
  }
  bool const has_columns = chunk * 8 < head_dim;
  // Not unrolled to the end: the addresses of many rows at once would need too many registers.
#pragma unroll 4
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    int const r = first + i * kRowsAtOnce;
    Element const* const row = rows(r);
    bool const there = has_columns && row != nullptr;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_place<Traits::kRowDim>(r, chunk), there ? row + chunk * 8 : legal, there);
  }
}

// Of consecutive tokens, whose addresses are one step apart. Where all of them are in the sequence
// nothing else is computed.
template <class Traits, int kRows, class Element>
__device__ __forceinline__ void copy_tile(Element* to, TokenRows<Element> const& rows,
                                          Element const* legal, int32_t head_dim) {
  constexpr int kChunks = Traits::kRowDim / 8;
  constexpr int kRowsAtOnce = Traits::kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0, "whole passes of 16-byte chunks");
  int const chunk = threadIdx.x % kChunks;
  int const first = threadIdx.x / kChunks;
  if (chunk * 8 >= Traits::kHeadDim) {
    return;
  }
  Element const* row = rows.base + (rows.first + first) * rows.stride + chunk * 8;
  if (rows.first + kRows <= rows.length && head_dim == Traits::kHeadDim) {
    CUTE_UNROLL
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(
          to + chunk_place<Traits::kRowDim>(first + i * kRowsAtOnce, chunk), row);
      row += kRowsAtOnce * rows.stride;
    }
    return;
  }
  int32_t const end = chunk * 8 < head_dim ? rows.length - rows.first : 0;
  CUTE_NO_UNROLL
  for (int r = first; r < kRows; r += kRowsAtOnce) {
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_place<Traits::kRowDim>(r, chunk), r < end ? row : legal, r < end);
    row += kRowsAtOnce * rows.stride;
  }
}

}  // namespace sparse_fmha::sm80
