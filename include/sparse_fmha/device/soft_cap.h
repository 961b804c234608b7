// The tanh of capped scores.
#pragma once

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

// The relative error is at most 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Replaces scores by tanh(factor * score).
template <class Scores>
__device__ __forceinline__ void tanh_scores(Scores& s, float factor) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(s); ++i) {
    s(i) = tanh_approx(s(i) * factor);
  }
}

}  // namespace sparse_fmha::device
