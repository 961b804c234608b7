// A bias of a key in the units of scores.
#pragma once

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

// Finite biases stay finite.
inline __device__ float bias_in_log2(float bias) {
  constexpr float kLog2e = 1.44269504088896340736f;
  constexpr float kLargest = 3e38f;
  float const x = bias * kLog2e;
  return fabsf(bias) < INFINITY ? fminf(fmaxf(x, -kLargest), kLargest) : x;
}

}  // namespace sparse_fmha::device
