// Controls where ptxas places a wait.
#pragma once

namespace sparse_fmha::sm90 {

// Keeps a later wait after the computation of `weight`. A weight is never negative, so the arrival
// is never executed; but ptxas cannot know that, and does not move a wait across a possible
// arrival.
__device__ __forceinline__ void stay_behind(float weight) {
  if (weight < 0.f) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(0) : "memory");
  }
}

}  // namespace sparse_fmha::sm90
