// Asynchronous copies of rows to shared memory.
#pragma once

#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

// The address some bytes from `base`. Bytes save the shift of every address.
template <class Element>
__device__ __forceinline__ Element const* bytes_from(Element const* base, int64_t bytes) {
  return reinterpret_cast<Element const*>(reinterpret_cast<char const*>(base) + bytes);
}

// The same value, such that what is computed from it is computed where it is used. Compilers
// compute what does not change before the main loop, whose registers it then takes.
__device__ __forceinline__ int32_t again(int32_t x) {
  int32_t y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ int64_t again(int64_t x) {
  int64_t y;
  asm volatile("mov.b64 %0, %1;" : "=l"(y) : "l"(x));
  return y;
}
__device__ __forceinline__ int32_t thread_again() {
  int32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Rows of tokens that are not in order. A 32-bit stride in bytes makes an address one
// multiply-add, so others do not take at().
template <class Element>
struct TokenAddress {
  static __device__ __forceinline__ bool is_short(int64_t stride) {
    return stride < int64_t{1} << 31;
  }
  static __device__ __forceinline__ Element const* of(Element const* base, int64_t stride,
                                                      int32_t token) {
    uint32_t const bytes = static_cast<uint32_t>(stride) * sizeof(Element);
    return bytes_from(base, uint64_t{static_cast<uint32_t>(token)} * bytes);
  }
};

// Rows of a sequence that start at a token.
template <class Element>
struct TokenRows {
  Element const* base;  // of token 0
  int64_t stride;
  int32_t first;
  int32_t length;
};

// Where a thread's chunks of a tile go. Passes that are eight rows apart have the same swizzle.
template <int kRowDim, int kRowsAtOnce, class Element>
class ChunkPlaces {
 public:
  __device__ __forceinline__ ChunkPlaces(Element* tile, int first, int chunk) {
    CUTE_UNROLL
    for (int i = 0; i < kSwizzles; ++i) {
      first_[i] = tile + chunk_place<kRowDim>(first + i * kRowsAtOnce, chunk);
    }
  }
  __device__ __forceinline__ Element* at(int pass) const {
    int const swizzle = pass % kSwizzles;
    return first_[swizzle] + (pass - swizzle) * kRowsAtOnce * kRowDim;
  }

 private:
  static constexpr int kSwizzles = kRowsAtOnce < 8 ? 8 / kRowsAtOnce : 1;
  Element* first_[kSwizzles];
};

// Copies kRows rows of a head to a swizzled tile. Rows has
//
//   base                     an address that the others below are relative to
//   whole()                  whether all rows exist
//   at<kRowsAtOnce>(r, n)    the address of row r + n, where n is known at compile time and a
//                            multiple of kRowsAtOnce, and 0 <= r < kRowsAtOnce
//   operator()(r)            the same for any row; nullptr if it does not exist
//
// Rows that do not exist are zero, as columns from `head_dim` are. `legal` is an address that can
// be read. Called by all threads; returns with the copies in flight, not yet committed.
template <class Traits, int kRows, class Element, class Rows>
__device__ __forceinline__ void copy_tile(Element* to, Rows rows, Element const* legal,
                                          int32_t head_dim) {
  constexpr int kChunks = kLanesOfRow<Traits::kRowDim>;
  constexpr int kRowsAtOnce = Traits::kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0, "whole passes of 16-byte chunks");
  int const thread = thread_again();
  int const chunk = thread % kChunks;
  int const first = thread / kChunks;
  if (chunk * 8 >= Traits::kHeadDim) {
    return;  // columns that only round up the row are never read, if they are there
  }
  rows.base += chunk * 8;
  if (rows.whole() && again(head_dim) == Traits::kHeadDim) {
    // Addresses first: what rows share is read once, and nothing waits for each look-up alone.
    constexpr int kPasses = kRows / kRowsAtOnce;
    constexpr int kGroup = kPasses < Traits::kAddresses ? kPasses : Traits::kAddresses;
    static_assert(kPasses % kGroup == 0, "whole groups of passes");
    ChunkPlaces<Traits::kRowDim, kRowsAtOnce, Element> const places(to, first, chunk);
    CUTE_UNROLL
    for (int pass = 0; pass < kPasses; pass += kGroup) {
      Element const* from[kGroup];
      CUTE_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        from[i] = rows.template at<kRowsAtOnce>(first, (pass + i) * kRowsAtOnce);
      }
      CUTE_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(places.at(pass + i),
                                                                           from[i]);
      }
    }
    return;
  }
  bool const has_columns = chunk * 8 < head_dim;
  // Not unrolled to the end: the addresses of many rows at once would need too many registers.
#pragma unroll 2
  for (int r = first; r < kRows; r += kRowsAtOnce) {
    Element const* const row = rows(r);
    bool const there = has_columns && row != nullptr;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_place<Traits::kRowDim>(r, chunk), there ? row : legal, there);
  }
}

// Of consecutive tokens, whose addresses are one step apart. Where all of them are in the sequence
// nothing else is computed.
template <class Traits, int kRows, class Element>
__device__ __forceinline__ void copy_tile(Element* to, TokenRows<Element> const& rows,
                                          Element const* legal, int32_t head_dim) {
  constexpr int kChunks = kLanesOfRow<Traits::kRowDim>;
  constexpr int kRowsAtOnce = Traits::kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0, "whole passes of 16-byte chunks");
  int const chunk = threadIdx.x % kChunks;
  int const first = threadIdx.x / kChunks;
  if (chunk * 8 >= Traits::kHeadDim) {
    return;
  }
  Element const* row = rows.base + (rows.first + first) * rows.stride + chunk * 8;
  if (rows.first + kRows <= rows.length && head_dim == Traits::kHeadDim) {
    ChunkPlaces<Traits::kRowDim, kRowsAtOnce, Element> const places(to, first, chunk);
    CUTE_UNROLL
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(places.at(i), row);
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
