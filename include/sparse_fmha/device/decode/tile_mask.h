// What the rows of a piece see of a tile that some row does not see all of.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/decode/pieces.h"

namespace sparse_fmha::device {

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

}  // namespace sparse_fmha::device
