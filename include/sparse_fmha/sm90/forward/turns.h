// Consumers that issue their products one after another.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Does nothing if the schedule is kFree.
template <class Traits>
struct Turns {
  static constexpr int kThreads = 256;  // one warpgroup waits, one arrives

  static __device__ __forceinline__ void give_to(int consumer) {
    if constexpr (Traits::kTakeTurns) {
      cutlass::arch::NamedBarrier::arrive(kThreads, consumer);
    }
  }
  static __device__ __forceinline__ void wait(int consumer) {
    if constexpr (Traits::kTakeTurns) {
      cutlass::arch::NamedBarrier::sync(kThreads, consumer);
    }
  }
  // `consumer` has finished its turn.
  static __device__ __forceinline__ void pass(int consumer) {
    give_to(consumer + 1 == Traits::kConsumers ? 0 : consumer + 1);
  }
};

}  // namespace sparse_fmha::sm90
