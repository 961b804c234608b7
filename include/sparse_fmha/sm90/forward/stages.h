// The ring stages, in the order in which a consumer warpgroup visits them.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/turns.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry>
struct Stages {
  SharedStorage<Traits, Geometry>& smem;
  int const warpgroup;               // among the consumers
  RingState<Traits::kStages> state;  // of the current key tile; its value tile has the same

  // Passes over the next `count` of the `loaded` key tiles, which are for other warpgroups.
  __device__ __forceinline__ void pass_over(int count, int loaded) {
    CUTE_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      smem.ring_k.wait(state);
      smem.ring_k.release(state);
      smem.ring_v.wait(state);
      smem.ring_v.release(state);
      state.advance();
      if (i + 1 < loaded) {
        Turns<Traits>::wait(warpgroup);
        Turns<Traits>::pass(warpgroup);
      }
    }
  }

  // Advances to the i-th stage of the walk. kOthers: a stage of the other consumer may come before
  // it.
  template <bool kOthers = kHasStreams<Geometry>, class Walk>
  __device__ __forceinline__ void enter(Walk const& walk, int i) {
    if constexpr (kOthers) {
      if (walk.follows_other(i)) {
        state.advance();
      }
    }
  }
  // Waits until the i-th stage of the walk, at `place`, has landed. A stage passed over before it
  // is released here, keys and values separately, so the products do not wait.
  template <bool kOthers = kHasStreams<Geometry>, class Walk>
  __device__ __forceinline__ void wait(Ring<Traits::kStages>& ring, Walk const& walk, int i,
                                       RingState<Traits::kStages> const& place) {
    if constexpr (kOthers) {
      if (walk.follows_other(i)) {
        auto passed = place;
        passed.retreat();
        ring.wait(passed);
        ring.release(passed);
      }
    }
    ring.wait(place);
    if constexpr (kGathers<Geometry>) {
      cutlass::arch::fence_view_async_shared();  // makes copies visible to the matrix unit
    }
  }
};

}  // namespace sparse_fmha::sm90
