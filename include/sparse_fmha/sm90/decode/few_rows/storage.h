// Shared memory of a decode kernel of few rows.
#pragma once

#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/decode/few_rows/traits.h"

namespace sparse_fmha::sm90 {

// What a warp has of a tile. Each warp copies, waits and computes by itself.
template <class Traits>
struct FewRowsStage {
  static constexpr int kElements = Traits::kTileK * Traits::kHeadDim;
  typename Traits::Element keys[kElements];
  typename Traits::Element values[kElements];
};

// The position that each box of a stage begins with, or -1, and whether some row does not see all.
template <class Traits>
struct FewRowsPlaces {
  int32_t begin[Traits::kMostBoxes];
  bool masked;
};

// The rows' references in log2 units and sums, and outputs that are not normalised, of one warp or
// block.
struct RowSums {
  float2 sums[16];
};

template <class Traits>
struct FewRowsStorage {
  static constexpr int kRowFloats = Traits::kHeadDim + 4;  // of `outputs`: no bank conflicts
  static constexpr int kOutputs = Traits::kTileQ * kRowFloats;

  union {
    alignas(1024) FewRowsStage<Traits> stages[Traits::kWarps][Traits::kStages];
    float outputs[Traits::kWarps][kOutputs];  // once all stages are read
  };
  // What the blocks of a cluster send: outputs of the elements that this block finishes.
  float4 received[Traits::kTileQ * Traits::kHeadDim / 4 + Traits::kMostBlocks];
  RowSums of_blocks[Traits::kMostBlocks];
  RowSums of_warps[Traits::kWarps];
  FewRowsPlaces<Traits> places[Traits::kWarps][Traits::kStages];
  FullBarrier full[Traits::kWarps][Traits::kStages];
};

}  // namespace sparse_fmha::sm90
