// A scale below zero: softmax(-x) of Q.K is softmax(x) of -Q.K, and the maximum is then the right
// one.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// The queries of a consumer warpgroup, in shared memory. Its threads call this together, and
// synchronise afterwards.
template <class Traits>
__device__ __forceinline__ void negate_rows(typename Traits::Element* q, int warpgroup) {
  for (int d = 0; d < Traits::kHeadDim; d += 64) {
    auto volatile* words =
        reinterpret_cast<uint32_t*>(q + d * Traits::kTileQ + warpgroup * 64 * 64);
    for (int i = threadIdx.x % 128; i < 64 * 64 / 2; i += 128) {
      words[i] = words[i] ^ 0x80008000u;
    }
  }
  cutlass::arch::fence_view_async_shared();
}

}  // namespace sparse_fmha::sm90
