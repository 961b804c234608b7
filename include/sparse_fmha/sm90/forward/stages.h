// The stages of the rings in the order in which a consumer warpgroup walks over them.
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
  RingState<Traits::kStages> state;  // of the key tile at hand; its value tile has the same

  // The next `count` of the `loaded` key tiles are for other warpgroups.
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

  // From the stage before the i-th of the walk to that; kOthers: the other's may lie between them.
  template <bool kOthers = kHasStreams<Geometry>, class Walk>
  __device__ __forceinline__ void enter(Walk const& walk, int i) {
    if constexpr (kOthers) {
      if (walk.follows_other(i)) {
        state.advance();
      }
    }
  }
  // Until the i-th stage of the walk, at `place`, has landed. The one that is passed over on the
  // way is given back here, keys and values each in their time: the products do not wait.
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
      cutlass::arch::fence_view_async_shared();  // the matrix unit reads what threads have copied
    }
  }
};

}  // namespace sparse_fmha::sm90
