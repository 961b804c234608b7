// The loop over the partial tiles of a walk, which come first.
#pragma once

#include "sparse_fmha/sm90/forward/step_policy.h"

namespace sparse_fmha::sm90 {

// From tile i on. Where consumers need different ones, also over full tiles until weights are at
// hand. The parts are those of accumulation.h.
template <class Policy, class Walk, class Reach, class Step, class IsForOthers>
__device__ __forceinline__ void loop_over_partial(Walk const& walk, int tiles, int& i,
                                                  bool& has_weights, Reach const& reach,
                                                  Step const& step,
                                                  IsForOthers const& is_for_others) {
  constexpr typename Policy::Yes kYes{};
  constexpr typename Policy::No kNo{};
  constexpr typename Policy::Streams kOthers{};
  if constexpr (Policy::kPartialLoop == PartialLoop::kNeeded) {
    // Some of the partial tiles are for the other warpgroups alone.
    constexpr cute::bool_constant<Policy::kReference == Reference::kLagsOfMasked> kAhead{};
    CUTE_NO_UNROLL
    for (; i < tiles && (i < walk.num_partial || !has_weights); ++i) {
      if (is_for_others(i)) {
        continue;
      }
      reach(i, kOthers);
      if (has_weights) {
        step(i, kYes, kYes, kAhead, kOthers);
      } else {
        step(i, kYes, kNo, kAhead, kOthers);
        has_weights = true;
      }
    }
  } else {
    constexpr typename Policy::MaximumFirst kMaximumFirst{};
    CUTE_NO_UNROLL
    for (; i < walk.num_partial; ++i) {
      reach(i, kOthers);
      step(i, kYes, kYes, kMaximumFirst, kOthers);
    }
  }
}

}  // namespace sparse_fmha::sm90
