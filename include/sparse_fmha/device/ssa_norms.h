// From scores of SSA's choice to weights.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/device/ssa_scores.h"

namespace sparse_fmha::device {

// The log-sum-exps of a lane's rows, in log2 units.
template <int kOctets>
struct SsaNorms {
  float top[kOctets];
  float sum[kOctets];

  __device__ __forceinline__ SsaNorms() {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      top[o] = -__FLT_MAX__;  // finite, so a row without keys has no inf - inf
      sum[o] = 0;
    }
  }
  __device__ __forceinline__ void add(SsaScores<kOctets / 2>& scores) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float most = top[o];
#pragma unroll
      for (int i = 0; i < kSsaKeys / 4; ++i) {
        most = fmaxf(most, scores.at(o, i / 2, i % 2));
      }
      sum[o] *= exp2_approx(top[o] - most);
#pragma unroll
      for (int i = 0; i < kSsaKeys / 4; ++i) {
        sum[o] += exp2_approx(scores.at(o, i / 2, i % 2) - most);
      }
      top[o] = most;
    }
  }
  // Turns scores into weights, after finish().
  __device__ __forceinline__ void weigh(SsaScores<kOctets / 2>& scores, float scale_log2) const {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < kSsaKeys / 4; ++i) {
        float& score = scores.at(o, i / 2, i % 2);
        score = exp2_approx(fmaf(score, scale_log2, -top[o]));
      }
    }
  }
  // Over the four lanes of a row; leaves the result in `top`.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        float const other = __shfl_xor_sync(kWholeWarp, top[o], step);
        float const others = __shfl_xor_sync(kWholeWarp, sum[o], step);
        float const most = fmaxf(top[o], other);
        sum[o] = sum[o] * exp2_approx(top[o] - most) + others * exp2_approx(other - most);
        top[o] = most;
      }
      // Lanes may have rounded otherwise, and equal blocks must have equal weights.
      top[o] = __shfl_sync(kWholeWarp, top[o] + log2f(sum[o]), threadIdx.x % 32 / 4 * 4);
    }
  }
};

}  // namespace sparse_fmha::device
