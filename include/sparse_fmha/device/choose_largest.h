// The largest of the scores that a thread block has in shared memory. All functions are called by
// all threads of the block, which are whole warps.
#pragma once

#include <cstdint>

namespace sparse_fmha::device {

// An integer in the order of the scores. 0, below all others, for -inf and NaN.
__device__ __forceinline__ uint32_t order_of(float score) {
  if (!(score > -INFINITY)) {
    return 0;
  }
  uint32_t const bits = score == 0 ? 0 : __float_as_uint(score);  // -0 as 0
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

// Memory of the functions below.
struct ChoiceMemory {
  static constexpr int kBins = 256;
  static constexpr int kMostWarps = 32;
  int32_t bins[kBins];
  uint32_t sums[kMostWarps];
  uint32_t digit;
  int32_t left;
};

// Those above `order` are among the n largest, and as many of those equal to it as `ties` says.
struct Cut {
  uint32_t order;
  int32_t ties;
};

// By digits of eight bits. Scores of order 0 are never among the largest.
__device__ __forceinline__ Cut find_cut(float const* scores, int32_t count, int32_t n,
                                        ChoiceMemory& memory) {
  constexpr int kOfLane = ChoiceMemory::kBins / 32;
  uint32_t prefix = 0;
  int32_t left = n;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < ChoiceMemory::kBins; bin += blockDim.x) {
      memory.bins[bin] = 0;
    }
    __syncthreads();
    for (int32_t j = threadIdx.x; j < count; j += blockDim.x) {
      uint32_t const order = order_of(scores[j]);
      if (order != 0 && (shift == 24 || order >> (shift + 8) == prefix)) {
        atomicAdd(&memory.bins[order >> shift & 0xff], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane 0 has the largest digits.
      int const top = ChoiceMemory::kBins - 1 - static_cast<int>(threadIdx.x) * kOfLane;
      int32_t own = 0;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        own += memory.bins[top - i];
      }
      int32_t end = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int32_t const before = __shfl_up_sync(0xffffffff, end, step);
        end += static_cast<int>(threadIdx.x) >= step ? before : 0;
      }
      if (end - own < left && left <= end) {
        int32_t rest = left - (end - own);
        int digit = top;
        while (memory.bins[digit] < rest) {
          rest -= memory.bins[digit--];
        }
        memory.digit = static_cast<uint32_t>(digit);
        memory.left = rest;
      } else if (threadIdx.x == 31 && end < left) {
        memory.left = 0;  // there are fewer
      }
    }
    __syncthreads();
    left = memory.left;
    if (left == 0) {
      return {0, 0};
    }
    prefix = prefix << 8 | memory.digit;
  }
  return {prefix, left};
}

// A thread's sum of those before it, and that of all.
struct Place {
  uint32_t before;
  uint32_t total;
};

// A barrier must be between two calls.
__device__ __forceinline__ Place place_of(uint32_t own, ChoiceMemory& memory) {
  int const lane = threadIdx.x % 32;
  uint32_t end = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    uint32_t const before = __shfl_up_sync(0xffffffff, end, step);
    end += lane >= step ? before : 0;
  }
  if (lane == 31) {
    memory.sums[threadIdx.x / 32] = end;
  }
  __syncthreads();
  Place place = {end - own, 0};
  for (int warp = 0; warp < blockDim.x / 32; ++warp) {
    uint32_t const sum = memory.sums[warp];
    place.before += warp < threadIdx.x / 32 ? sum : 0;
    place.total += sum;
  }
  return place;
}

}  // namespace sparse_fmha::device
