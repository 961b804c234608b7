// The loops over the key tiles of a walk: partial tiles, then the rest. Their parts, such as the
// step, are in accumulation.h.
#pragma once

#include "sparse_fmha/sm90/forward/step_policy.h"

namespace sparse_fmha::sm90 {

// Starts at tile i. If consumers need different tiles, also covers full tiles until there are
// weights.
template <class Policy, class Walk, class Reach, class Step, class IsForOthers>
__device__ __forceinline__ void loop_over_partial(Walk const& walk, int tiles, int& i,
                                                  bool& has_weights, Reach const& reach,
                                                  Step const& step,
                                                  IsForOthers const& is_for_others) {
  constexpr typename Policy::Yes kYes{};
  constexpr typename Policy::No kNo{};
  constexpr typename Policy::Streams kOthers{};
  if constexpr (Policy::kPartialLoop == PartialLoop::kNeeded) {
    // Some partial tiles are only for other warpgroups.
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

// Starts at tile i.
template <class Policy, class Walk, class Reach, class Step>
__device__ __forceinline__ void loop_over_rest(Walk const& walk, int tiles, int& i,
                                               Reach const& reach, Step const& step) {
  constexpr typename Policy::Yes kYes{};
  constexpr typename Policy::No kNo{};
  constexpr typename Policy::MaximumFirst kMaximumFirst{};
  constexpr typename Policy::Streams kOthers{};
  // Steps against the current reference, up to `end`. A rare case ends the loop, so that ptxas
  // emits no code for it inside; jumps around such code cost 2% of the time.
  [[maybe_unused]] auto steps_ahead = [&](int end, auto others) {
    constexpr typename Policy::Ahead kAhead{};
    CUTE_NO_UNROLL
    for (; i < end; ++i) {
      reach(i, others);
      if (!step(i, kNo, kYes, kAhead, others)) {
        ++i;
        break;
      }
    }
  };
  if constexpr (Policy::kRestLoop == RestLoop::kSpans) {
    // The first and the last tiles are masked.
    int masked_end = walk.whole.begin;
    CUTE_NO_UNROLL
    while (i < tiles) {
      CUTE_NO_UNROLL
      for (; i < masked_end; ++i) {
        reach(i, kOthers);
        step(i, kYes, kYes, kMaximumFirst, kOthers);
      }
      if constexpr (Policy::kReference != Reference::kMaximum) {
        CUTE_NO_UNROLL
        while (i < walk.whole.end && walk.both == tiles) {
          steps_ahead(walk.whole.end, kNo);
        }
      }
      // A consumer releases its own stages as early as it can: loading them is the bottleneck.
      CUTE_NO_UNROLL
      for (; i < walk.whole.end; ++i) {
        reach(i, kOthers);
        step(i, kNo, kYes, kMaximumFirst, kOthers);
      }
      masked_end = tiles;
    }
  } else if constexpr (Policy::kRestLoop == RestLoop::kLags) {
    CUTE_NO_UNROLL
    while (i < tiles) {
      steps_ahead(tiles, kOthers);
    }
  } else {
    constexpr typename Policy::RestMasked kMasked{};
    CUTE_NO_UNROLL
    for (; i < tiles; ++i) {
      reach(i, kOthers);
      step(i, kMasked, kYes, kMaximumFirst, kOthers);
    }
  }
}

}  // namespace sparse_fmha::sm90
