// Where ptxas puts a wait.
#pragma once

namespace sparse_fmha::sm90 {

// Keeps a wait that follows behind the computation of `weight`. That is never negative, so nothing
// arrives anywhere; but ptxas cannot know, and moves no wait over what may be an arrival.
__device__ __forceinline__ void stay_behind(float weight) {
  if (weight < 0.f) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(0) : "memory");
  }
}

}  // namespace sparse_fmha::sm90
