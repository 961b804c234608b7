// The loop over key tiles that a vote may leave out.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// From tile i on. Leaves in has_weights whether those of the last tile are at hand; its values are
// still to be met or given back. The parts are those of accumulation.h.
template <class Policy, class Walk, class Reach, class Step, class IsForOthers>
__device__ __forceinline__ void loop_with_votes(Walk const& walk, int tiles, int& i,
                                                bool& has_weights, Reach const& reach,
                                                Step const& step,
                                                IsForOthers const& is_for_others) {
  constexpr typename Policy::Yes kYes{};
  constexpr typename Policy::No kNo{};
  constexpr typename Policy::MaximumFirst kMaximumFirst{};
  constexpr typename Policy::Streams kOthers{};
  // The values of the tile before are always still to be met or given back.
  auto visit = [&](auto masked) {
    reach(i, kOthers);
    has_weights = has_weights ? step(i, masked, kYes, kMaximumFirst, kOthers)
                              : step(i, masked, kNo, kMaximumFirst, kOthers);
  };
  CUTE_NO_UNROLL
  for (; i < walk.num_partial; ++i) {
    if (is_for_others(i)) {
      continue;
    }
    visit(kYes);
  }
  // Loops of their own for both cases keep the stages in uniform registers.
  constexpr typename Policy::RestMasked kRest{};
  CUTE_NO_UNROLL
  while (i < tiles) {
    if (has_weights) {
      CUTE_NO_UNROLL
      while (i < tiles && has_weights) {
        reach(i, kOthers);
        has_weights = step(i++, kRest, kYes, kMaximumFirst, kOthers);
      }
    } else {
      CUTE_NO_UNROLL
      while (i < tiles && !has_weights) {
        reach(i, kOthers);
        has_weights = step(i++, kRest, kNo, kMaximumFirst, kOthers);
      }
    }
  }
}

}  // namespace sparse_fmha::sm90
