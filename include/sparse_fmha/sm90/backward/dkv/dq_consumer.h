// The warpgroup of dQ in a kernel where it has one of its own. The consumers of dK and dV are ahead
// of it by at most the number of stages.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/add_dq.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct DqConsumer {
  DkvParams<Geometry, Mechanism> const& params;
  DkvStorageWithDq<Traits, Geometry>& smem;
  Geometry const geometry;

  __device__ __forceinline__ void run() {
    AddDq<Traits, Geometry, Mechanism> const dq{params, smem};
    auto sums = dq.new_sums();
    RingState<1> state_work;
    RingState<Traits::kStages> state;
    while (true) {
      auto const work = smem.work.get(state_work);
      if (work.tile.batch < 0) {
        return;
      }
      int const steps = geometry.steps(work).count;
      smem.ring_keys.wait(state_work);
      CUTE_NO_UNROLL
      for (int i = 0; i < steps; ++i) {
        smem.ring_grads.wait(state);
        int32_t const tile = smem.query_tile(state);
        constexpr int kParts = Traits::kHeadDim / Traits::kDqColumns;
        CUTE_UNROLL
        for (int part = 0; part < kParts; ++part) {
          dq.issue(sums, part, state);
          cute::warpgroup_wait<0>();
          cute::warpgroup_fence_operand(sums);
          if (part + 1 == kParts) {
            smem.ring_grads.release(state);
          }
          dq.add(sums, part, tile);
        }
        state.advance();
      }
      smem.ring_keys.release(state_work);
      state_work.advance();
    }
  }
};

}  // namespace sparse_fmha::sm90
