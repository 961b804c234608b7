// Gathers single rows of a tensor into a stage with 16-byte cp.async copies. The layout is that of
// a TMA copy.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "sparse_fmha/core/config.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

// [B, L, H, D]; strides in elements.
struct RowSource {
  void const* data;
  int64_t batch_stride;
  int64_t head_stride;
  uint32_t row_chunks;  // stride of a token, in chunks of 16 bytes
  int32_t head_dim;     // later columns are zero
  int32_t length;       // later tokens are zero
};

// Index of element (row, column) in a stage of `rows` rows. Slices of 64 columns are stored one
// after another; within a slice, 16-byte chunks are XOR-swizzled by the row.
constexpr SPARSE_FMHA_HD int swizzled_place(int row, int column, int rows) {
  return column / 64 * rows * 64 + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8;
}

inline constexpr uint32_t kNoRow = 0xffffffff;

// One lane's share of a gather: one 16-byte chunk of every fourth row, at the same place in each
// slice of 64 columns.
template <int kHeadDim, class Element>
class RowGather {
 public:
  __device__ __forceinline__ RowGather(RowSource const& rows, int32_t batch, int32_t head)
      : rows_(rows),
        from_(reinterpret_cast<uint64_t>(static_cast<Element const*>(rows.data) +
                                         batch * rows.batch_stride + head * rows.head_stride +
                                         chunk() * kChunk)) {
    asm volatile("" : "+l"(from_));  // one multiplication per row, not one for each of these terms
  }

  // Which of 32 rows of a warp this lane supplies the token of. A group of eight lanes supplies the
  // eight rows that the group copies.
  static __device__ __forceinline__ int lane_row() { return chunk() * 4 + four(); }

  // Gathers rows [first, first + 32) of a stage of kTileRows rows, by a whole warp. `token` is the
  // token of row first + lane_row(). A token outside the tensor gives a row of zeros.
  template <int kTileRows>
  __device__ __forceinline__ void gather(int32_t token, int first, Element* stage) const {
    bool const there = static_cast<uint32_t>(token) < static_cast<uint32_t>(rows_.length);
    uint32_t const row = there ? static_cast<uint32_t>(token) * rows_.row_chunks : kNoRow;
    if (__all_sync(0xffffffff, there && columns() > kHeadDim - 64)) {
      gather<kTileRows, true>(row, first, stage);
    } else {
      gather<kTileRows, false>(row, first, stage);
    }
  }

 private:
  static constexpr int kChunk = 8;  // elements per copy
  static constexpr int kChunkBytes = 16;
  static __device__ __forceinline__ int chunk() { return threadIdx.x % 8; }
  static __device__ __forceinline__ int four() { return threadIdx.x % 32 / 8; }
  // Columns of the head from the lane's first one; later ones are zero.
  __device__ __forceinline__ int32_t columns() const { return rows_.head_dim - chunk() * kChunk; }

  // kWhole: all rows and all of their columns exist.
  template <int kTileRows, bool kWhole>
  __device__ __forceinline__ void gather(uint32_t row, int first, Element* stage) const {
    static_assert(kTileRows % 32 == 0 && sizeof(Element) == 2, "8 elements are 16 bytes");
    // Four rows are copied at a time. The swizzle repeats every eight rows: two base addresses.
    Element* const even = stage + swizzled_place(first + four(), chunk() * kChunk, kTileRows);
    Element* const odd = stage + swizzled_place(first + 4 + four(), chunk() * kChunk, kTileRows);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      uint32_t const start = __shfl_sync(0xffffffff, row, i, 8);
      bool const there = kWhole || start != kNoRow;
      auto const* const source =
          reinterpret_cast<Element const*>(from_ + uint64_t(there ? start : 0) * kChunkBytes);
      Element* const to = (i % 2 == 0 ? even : odd) + i / 2 * 8 * 64;
      CUTE_UNROLL
      for (int d = 0; d < kHeadDim; d += 64) {
        cutlass::arch::cp_async_zfill<kChunkBytes, cutlass::arch::CacheOperation::Global>(
            to + d * kTileRows, source + d, kWhole || (there && d < columns()));
      }
    }
  }

  RowSource const& rows_;
  uint64_t from_;  // address of the lane's first chunk of token 0
};

// Called once by each lane: arrives at the barrier when the lane's earlier copies have landed.
__device__ __forceinline__ void arrive_when_gathered(FullBarrier& barrier) {
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&barrier));
}

}  // namespace sparse_fmha::sm90
