// Shared memory of a decode kernel of few rows.
#pragma once

#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/decode/few_rows/traits.h"

namespace sparse_fmha::sm90 {

// The rows' references in log2 units and sums, and outputs that are not normalised, of one warp or
// block.
struct RowSums {
  float2 sums[16];
};

template <class Traits>
struct FewRowsStorage {
  using Element = typename Traits::Element;
  static constexpr int kRowFloats = Traits::kHeadDim + 4;  // of `outputs`: no bank conflicts
  static constexpr int kOutputs = Traits::kTileQ * kRowFloats;

  union {
    // Each warp copies, waits and computes by itself.
    alignas(1024) Element stages[Traits::kWarps][Traits::kStages][Traits::kTileElements];
    float outputs[Traits::kWarps][kOutputs];  // once all stages are read
  };
  // What the blocks of a cluster send: outputs of the elements that this block finishes.
  float4 received[Traits::kTileQ * Traits::kHeadDim / 4 + Traits::kMostBlocks];
  RowSums of_blocks[Traits::kMostBlocks];
  RowSums of_warps[Traits::kWarps];
  FullBarrier full[Traits::kWarps][Traits::kStages];
  int64_t warp_slots[Traits::kWarps];
};

}  // namespace sparse_fmha::sm90
