// Rows of a tensor, found one by one, into a stage: with asynchronous copies of 16 bytes, in the
// layout that a tensor copy would have left.
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

inline constexpr uint32_t kNoRow = 0xffffffff;

// What a lane gathers of rows: 16 bytes of each fourth one, and of those the same in each part of
// 64 columns.
template <int kHeadDim, class Element>
class RowGather {
 public:
  __device__ __forceinline__ RowGather(RowSource const& from, int32_t batch, int32_t head)
      : from_(reinterpret_cast<uint64_t>(static_cast<Element const*>(from.data) +
                                         batch * from.batch_stride + head * from.head_stride +
                                         chunk() * kChunk)),
        stride_(static_cast<uint32_t>(from.token_stride / kChunk)),
        columns_(from.head_dim - chunk() * kChunk),
        length_(from.length) {
    asm volatile("" : "+l"(from_));  // one product finds a row, not one for each of these
  }

  // Of a token: where its row begins, in chunks of 16 bytes; kNoRow where there is none.
  __device__ __forceinline__ uint32_t row_of(int32_t token) const {
    return token < length_ ? static_cast<uint32_t>(token) * stride_ : kNoRow;
  }

  // Rows [first, first + 32) of a stage of kTileRows, by a whole warp: lane i has row_of() of row
  // first + i.
  template <int kTileRows>
  __device__ __forceinline__ void gather(uint32_t row, int first, Element* stage) const {
    bool const whole = row != kNoRow && columns_ > kHeadDim - 64;
    if (__all_sync(0xffffffff, whole)) {
      gather<kTileRows, true>(row, first, stage);
    } else {
      gather<kTileRows, false>(row, first, stage);
    }
  }

 private:
  static constexpr int kChunk = 8;  // elements of a copy
  static constexpr int kChunkBytes = 16;
  static __device__ __forceinline__ int chunk() { return threadIdx.x % 8; }

  // kWhole: all rows are there, and all columns of them.
  template <int kTileRows, bool kWhole>
  __device__ __forceinline__ void gather(uint32_t row, int first, Element* stage) const {
    static_assert(kTileRows % 32 == 0 && sizeof(Element) == 2, "8 elements are 16 bytes");
    int const four = threadIdx.x % 32 / 8;  // of four rows that are copied together
    // The swizzle repeats after eight rows: two copies.
    Element* const even = stage + swizzled_place(first + four, chunk() * kChunk, kTileRows);
    Element* const odd = stage + swizzled_place(first + 4 + four, chunk() * kChunk, kTileRows);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      uint32_t const start = __shfl_sync(0xffffffff, row, i * 4 + four);
      bool const there = kWhole || start != kNoRow;
      auto const* const source =
          reinterpret_cast<Element const*>(from_ + uint64_t(there ? start : 0) * kChunkBytes);
      Element* const to = (i % 2 == 0 ? even : odd) + i / 2 * 8 * 64;
      CUTE_UNROLL
      for (int d = 0; d < kHeadDim; d += 64) {
        cutlass::arch::cp_async_zfill<kChunkBytes, cutlass::arch::CacheOperation::Global>(
            to + d * kTileRows, source + d, kWhole || (there && d < columns_));
      }
    }
  }

  uint64_t from_;  // address of the lane's first chunk of token 0
  uint32_t stride_;
  int32_t columns_;  // of the head from the lane's first one on; those beyond are zero
  int32_t length_;
};

// For each lane, once: the barrier is told when the copies so far have landed.
__device__ __forceinline__ void arrive_when_gathered(FullBarrier& barrier) {
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&barrier));
}

}  // namespace sparse_fmha::sm90
