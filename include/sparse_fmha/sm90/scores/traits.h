// The compile-time shape of a kernel that reduces scores.
//
// A thread block holds a tile of 128 rows of one operand and multiplies it with a stream of tiles
// of the other one; each of two consumer warpgroups has the scores of 64 held rows. What becomes of
// the scores is a reduction (reductions.h). Its `Held` says which operand is held.
#pragma once

#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

// Of kernels with a stream.
template <int HeadDim>
inline constexpr int kScoreStages = HeadDim == 256 ? 2 : 4;

template <class Element, int HeadDim, int Stages>
struct ScoreTraits : TileTraits<device::TileConfig<Dense, Element, HeadDim, 128, 128, Stages>> {
  using Tiles = TileTraits<device::TileConfig<Dense, Element, HeadDim, 128, 128, Stages>>;
  static constexpr int kTile = Tiles::kTileK;  // rows, held and streamed
  static_assert(Tiles::kTileQ == kTile);

  // Scores of a consumer warpgroup.
  using Scores = decltype(cute::partition_fragment_C(
      typename Tiles::MmaQK{}, cute::Shape<cute::_64, cute::Int<Tiles::kTileK>>{}));
};

}  // namespace sparse_fmha::sm90
