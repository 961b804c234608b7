// Negative scales: softmax(-x * Q.K) is softmax(x * -Q.K), so Q is negated. The row maximum is then
// correct.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Negates the queries of a consumer warpgroup in shared memory. All of its threads call this and
// synchronize afterwards.
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
