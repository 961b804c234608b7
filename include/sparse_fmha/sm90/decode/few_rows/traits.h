// The compile-time shape of a decode kernel of few rows.
#pragma once

#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/decode/traits.h"

namespace sparse_fmha::sm90 {

// Config: a row of csrc/kernels/sm90_decode.def with tile_q = 16, the rows of mma.sync. Its tile_k
// and stages are those of each warp.
template <class Config>
struct FewRowsTraits {
  using Element = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileK = Config::kTileK;
  static constexpr int kStages = Config::kStages;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMostBoxes = kTileK / 16;  // of a tile
  static constexpr int kMostBlocks = 8;           // of a cluster
  static constexpr int kSmemLimit = 227 * 1024;
  static_assert(kTileQ == 16, "a warp multiplies 16 rows");
  static_assert(kTileK % 16 == 0 && kTileK <= 64, "steps of the second product are 16 keys deep");
  static_assert(sizeof(Element) == 2 && kHeadDim % 64 == 0 && kHeadDim <= 128,
                "boxes are 64 columns wide, and a warp holds all queries and outputs");
  static_assert(Config::kSkipping == Skipping::kNever, "values are copied with their keys");

  // Where a chunk of eight elements of a tile is.
  static constexpr SPARSE_FMHA_HD int place(int row, int chunk) {
    return swizzled_place(row, chunk * 8, kTileK);
  }
};

}  // namespace sparse_fmha::sm90
