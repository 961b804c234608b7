// What the rows of a piece see of a tile that some row does not see all of.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/decode/pieces.h"
#include "sparse_fmha/sm90/decode/storage.h"

namespace sparse_fmha::sm90 {

// Of a worker's consumer warps.
__device__ __forceinline__ void sync_consumer(int worker) {
  cutlass::arch::NamedBarrier::sync(128, kConsumerBarrier + worker);
}

template <class Traits>
struct DecodeTileMask {
  DecodeParams const& params;
  DecodePiece const& piece;
  KeyRange const rows;
  int32_t const* const positions;  // of the tile's keys, or -1

  // Whether no row sees the key whose values the thread clears.
  __device__ __forceinline__ bool hides_row() const { return positions[threadIdx.x % 128 / 2] < 0; }

  // Hides keys from the rows that do not see them.
  template <class Scores>
  __device__ __forceinline__ void hide(Scores& scores) const {
    DecodeKeys const& keys = params.keys;
    KeyRange const range = keys.range(piece.at.batch, piece.at.head);
    AccumulatorPosition const place;
    int32_t query[kRowsPerThread];
    KeyRange seen[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = rows.begin + place.row + 8 * r;
      query[r] = min_int(row, rows.end - 1) / keys.group;
      seen[r] = row < rows.end ? keys.visible(range, query[r]) : KeyRange{0, 0};
    }
    uint32_t const in_trees = keys.tree.data != nullptr ? tree_bits(range, query) : ~0u;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      int const r = AccumulatorPosition::row_of(i);
      int32_t const position = positions[place.column + AccumulatorPosition::column_of(i)];
      bool const sees = position >= seen[r].begin && position < seen[r].end && (in_trees >> i & 1);
      scores(i) = sees ? scores(i) : -INFINITY;
    }
  }

 private:
  // A bit for each score of the thread: whether the tree shows its query the key.
  __device__ __forceinline__ uint32_t tree_bits(KeyRange range,
                                                int32_t const (&query)[kRowsPerThread]) const {
    static_assert(Traits::kTileK / 2 == 32, "a thread has 32 scores");
    AccumulatorPosition const place;
    uint32_t bits = 0;
    CUTE_NO_UNROLL
    for (int i = 0; i < 32; ++i) {
      int32_t const position = positions[place.column + AccumulatorPosition::column_of(i)];
      int32_t const asks = AccumulatorPosition::row_of(i) == 0 ? query[0] : query[1];
      bool const shown =
          position >= 0 && params.keys.in_tree(range, piece.at.batch, asks, position);
      bits |= uint32_t{shown} << i;
    }
    return bits;
  }
};

// Zeroes the values of the keys that no row sees: two threads to a row. A weight of zero does not
// make a number of NaN.
template <class Traits>
__device__ __forceinline__ void clear_hidden_row(typename Traits::Element* stage, bool hidden,
                                                 int worker) {
  if (hidden) {
    int const row = threadIdx.x % 128 / 2;
    CUTE_NO_UNROLL
    for (int column = threadIdx.x % 2 * 8; column < Traits::kHeadDim; column += 16) {
      *reinterpret_cast<uint4*>(stage + swizzled_place(row, column, Traits::kTileK)) = {0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  sync_consumer(worker);
}

}  // namespace sparse_fmha::sm90
