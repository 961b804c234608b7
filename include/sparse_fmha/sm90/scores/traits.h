// The compile-time shape of a kernel that reduces scores.
//
// A thread block holds a tile of one operand and multiplies it with a stream of tiles of 128 rows
// of the other one; each consumer warpgroup has the scores of 64 held rows. What becomes of the
// scores is a reduction (reductions.h). Its `Held` says which operand is held.
#pragma once

#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

inline constexpr int kScoreTile = 128;  // streamed rows

// Of kernels with a stream. Four consumers share what is streamed, where their rows fit.
template <int HeadDim>
inline constexpr int kHeldRows = HeadDim == 256 ? 128 : 256;
template <int HeadDim>
inline constexpr int kScoreStages = HeadDim == 256 ? 2 : 4;

template <class Element, int HeadDim, int Rows, int Stages>
struct ScoreTraits
    : TileTraits<device::TileConfig<Dense, Element, HeadDim, Rows, kScoreTile, Stages>> {
  using Tiles = TileTraits<device::TileConfig<Dense, Element, HeadDim, Rows, kScoreTile, Stages>>;
  static constexpr int kHeld = Rows;

  // Scores of a consumer warpgroup.
  using Scores = decltype(cute::partition_fragment_C(
      typename Tiles::MmaQK{}, cute::Shape<cute::_64, cute::Int<Tiles::kTileK>>{}));
};

}  // namespace sparse_fmha::sm90
