// Rows of a tensor, found one by one, into a stage: with asynchronous copies of 16 bytes by a warp,
// in the layout that a tensor copy would have left.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "sparse_fmha/config.h"
#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/smem.h"

namespace sparse_fmha::sm90 {

// [B, L, H, D]; strides in elements.
struct RowSource {
  void const* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
  int32_t head_dim;  // columns beyond are zero
  int32_t length;    // tokens beyond are zero
};

// Element (row, column) of a stage of `rows` rows: parts of 64 columns lie one behind the other,
// and in each the 16-byte chunks of a row change places by its number.
constexpr SPARSE_FMHA_HD int swizzled_place(int row, int column, int rows) {
  return column / 64 * rows * 64 + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8;
}

// Row r of the stage is token `keys[r]`. The whole warp calls this; eight lanes copy 128 bytes of a
// row together. Each lane arrives once at the barrier when its copies have
// landed.
template <int kHeadDim, int kRows, class Element>
__device__ __forceinline__ void gather_rows(RowSource const& from, int32_t batch, int32_t head,
                                            int32_t const* keys, Element* destination,
                                            FullBarrier& barrier) {
  constexpr int kChunk = 8;  // elements of a copy
  static_assert(sizeof(Element) == 2, "copies of 16 bytes are 8 elements");
  int const lane = threadIdx.x % 32;
  int const chunk = lane % 8;
  auto const* const base = static_cast<Element const*>(from.data) + batch * from.batch_stride +
                           head * from.head_stride + chunk * kChunk;
#pragma unroll 4
  for (int i = 0; i < kRows / 4; ++i) {
    int const r = i * 4 + lane / 8;
    int32_t const key = keys[r];
    bool const there = key < from.length;
    auto const* const row = base + (there ? key : 0) * from.token_stride;  // not read if not there
    Element* const to = destination + swizzled_place(r, chunk * kChunk, kRows);
    CUTE_UNROLL
    for (int d = 0; d < kHeadDim; d += 64) {
      bool const in_row = there && d + chunk * kChunk < from.head_dim;
      cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(to + d * kRows,
                                                                               row + d, in_row);
    }
  }
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&barrier));
}

}  // namespace sparse_fmha::sm90
