// Search through a list by a warp.
#pragma once

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

// The first of `count` indices for which test(i) holds, or count. Called by all lanes.
template <class Test>
__device__ __forceinline__ int32_t first_of_warp(int32_t count, Test test) {
  constexpr int kEach = 8;  // outstanding reads per lane
  CUTE_NO_UNROLL
  for (int32_t from = threadIdx.x % 32; from - static_cast<int32_t>(threadIdx.x % 32) < count;
       from += 32 * kEach) {
    bool found[kEach];
    CUTE_UNROLL
    for (int n = 0; n < kEach; ++n) {
      found[n] = from + 32 * n < count && test(from + 32 * n);
    }
    int32_t first = count;
    CUTE_UNROLL
    for (int n = kEach - 1; n >= 0; --n) {
      first = found[n] ? from + 32 * n : first;
    }
    first = static_cast<int32_t>(__reduce_min_sync(0xffffffff, static_cast<uint32_t>(first)));
    if (first < count) {
      return first;
    }
  }
  return count;
}

}  // namespace sparse_fmha::device
