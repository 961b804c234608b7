// The producer warp of a kernel that reduces scores.
#pragma once

#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/scores/held.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Reduction>
struct ScoreProducer {
  using Held = typename Reduction::Held;
  static constexpr int kOfLane = kScoreTile / 32;  // terms

  ScoreParams const& params;
  ScoreStorage<Traits, typename Reduction::Shared>& smem;
  ScoreWork const& work;

  // Run by a whole warp.
  __device__ __forceinline__ void run() const {
    int const lane = threadIdx.x % 32;
    if (lane == 0) {
      smem.ring_held.expect({}, Traits::kBytesQ);
      load_box<Traits::kHeadDim>(params.held, smem.ring_held.full[0], smem.held, Traits::kHeld,
                                 kReadOnce, work.held * Traits::kHeld,
                                 Held::held_head(params, work.head), work.batch);
    }
    int32_t const head = Held::streamed_head(params, work.head);
    RingState<Traits::kStages> state;
    CUTE_NO_UNROLL
    for (int32_t tile = work.begin; tile < work.end; ++tile, state.advance()) {
      float terms[kOfLane];  // they arrive while the stage is in use
      if constexpr (Reduction::kTerms) {
        CUTE_UNROLL
        for (int i = 0; i < kOfLane; ++i) {
          terms[i] = lse_log2(params, work, tile * kScoreTile + i * 32 + lane);
        }
      }
      smem.ring.acquire(state);
      if constexpr (Reduction::kTerms) {
        compiler_fence();
        CUTE_UNROLL
        for (int i = 0; i < kOfLane; ++i) {
          smem.terms[state.index][i * 32 + lane] = terms[i];
        }
        compiler_fence();
        __syncwarp();
      }
      if (lane == 0) {
        smem.ring.expect(state, Traits::kBytesK);
        load_box<Traits::kHeadDim>(params.streamed, smem.ring.full[state.index],
                                   smem.streamed + state.index * smem.kTileElements, kScoreTile,
                                   kReadByMany, tile * kScoreTile, head, work.batch);
      }
    }
  }
};

}  // namespace sparse_fmha::sm90
