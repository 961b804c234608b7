// Issue of a WGMMA product.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Issues acc (+)= a * b over the first kSteps slices of K. Registers must not be touched before the
// next wait.
template <bool kAccumulate, int kSteps, class Mma, class A, class B, class C>
__device__ __forceinline__ void issue_mma(Mma mma, A& a, B const& b, C& acc) {
  using namespace cute;
  if constexpr (!is_base_of<GMMA::DescriptorIterator, typename A::engine_type::iterator>::value) {
    warpgroup_fence_operand(a);
  }
  warpgroup_fence_operand(acc);
  warpgroup_arrive();
  mma.accumulate_ = kAccumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    gemm(mma, a(_, _, k), b(_, _, k), acc);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

}  // namespace sparse_fmha::sm90
