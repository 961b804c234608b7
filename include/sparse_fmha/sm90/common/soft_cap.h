// Soft caps of scores: cap * tanh(scale * score / cap). The kernels that take biases of keys have
// them, too.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/soft_cap.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// 0 has -inf, and so have numbers below the normal ones.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct SoftCap {
  float log2 = 0.f;     // the cap in log2 units; 0: none
  float inverse = 0.f;  // of `log2`

  __device__ __forceinline__ bool given() const { return log2 != 0.f; }

  // If scores are to be capped, replaces them by the quotients of the capped ones and the cap.
  // Returns the factor that makes them scores in log2 units.
  template <class Scores>
  __device__ __forceinline__ float apply(Scores& s, float scale_log2) const {
    if (!given()) {
      return scale_log2;
    }
    tanh_scores(s, scale_log2 * inverse);
    return log2;
  }
  // The derivative of a capped score by the score, from its quotient with the cap, which is not
  // finite if it was found from a weight of 0.
  static __device__ __forceinline__ float slope(float quotient) {
    return fmaxf(fmaf(-quotient, quotient, 1.f), 0.f);
  }
};

inline SoftCap soft_cap(FmhaProblem const& p) {
  if (p.softcap == 0) {
    return {};
  }
  // So that all products of scale and cap are finite.
  double const least = 1e-30 * std::max(std::abs(p.scale), 1e-5);
  double const log2 = std::clamp(p.softcap, least, 1e37) * M_LOG2E;
  return {static_cast<float>(log2), static_cast<float>(1 / log2)};
}

}  // namespace sparse_fmha::sm90
