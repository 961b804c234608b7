// Shared-memory storage of a thread block.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/key_bias.h"

namespace sparse_fmha::sm90 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;  // counts the bytes of copies
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// Index and phase of a ring of stages.
template <int Stages>
struct RingState {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++index == Stages) {
      index = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void retreat() {
    if (--index < 0) {
      index = Stages - 1;
      phase ^= 1;
    }
  }
};

// A ring of stages of one operand, between the producer and the consumers.
template <int Stages>
struct Ring {
  FullBarrier full[Stages];
  EmptyBarrier empty[Stages];

  __device__ __forceinline__ void init(int consumer_warps, int producers = 1) {
    for (int i = 0; i < Stages; ++i) {
      full[i].init(producers);
      empty[i].init(consumer_warps);
    }
  }
  // Producer: waits until the stage is free.
  __device__ __forceinline__ void acquire(RingState<Stages> const& s) {
    empty[s.index].wait(s.phase ^ 1);
  }
  // Producer: announces that `bytes` will land in the stage.
  __device__ __forceinline__ void expect(RingState<Stages> const& s, uint32_t bytes) {
    full[s.index].arrive_and_expect_tx(bytes);
  }
  __device__ __forceinline__ void wait(RingState<Stages> const& s) { full[s.index].wait(s.phase); }
  // Consumer: one arrival per warp that has read the stage.
  __device__ __forceinline__ void release(RingState<Stages> const& s) {
    if (threadIdx.x % 32 == 0) {
      empty[s.index].arrive();
    }
  }
};

// Keeps the compiler from moving memory accesses across a barrier operation. The operation alone
// does not.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

// Passes the current query tile from the producer to all readers. Every thread reads it from the
// same address, so the compiler knows that it is uniform in a warp and keeps the loops over key
// tiles in uniform registers.
template <class Work>
struct WorkSlot {
  Ring<1> ring;
  Work work;

  __device__ __forceinline__ void init(int readers) {
    ring.full[0].init(1);
    ring.empty[0].init(readers);
  }
  template <class Fill>
  __device__ __forceinline__ void put(RingState<1> const& state, Fill fill) {
    ring.empty[0].wait(state.phase ^ 1);
    compiler_fence();
    fill(work);
    compiler_fence();
    if (threadIdx.x % 32 == 0) {
      ring.full[0].arrive();
    }
  }
  __device__ __forceinline__ Work get(RingState<1> const& state) {
    ring.wait(state);
    compiler_fence();
    Work const result = work;
    compiler_fence();
    ring.empty[0].arrive();
    return result;
  }
  // The two parts of get(), for a reader that decides when the next tile is taken.
  __device__ __forceinline__ Work peek(RingState<1> const& state) {
    ring.wait(state);
    compiler_fence();
    return work;
  }
  __device__ __forceinline__ void let_next() {
    compiler_fence();
    ring.empty[0].arrive();
  }
};

template <class Traits, class Geometry>
struct SharedStorage {
  using Element = typename Traits::Element;
  static constexpr int kKeyElements = Traits::kTileK * Traits::kHeadDim;  // of one stage
  static constexpr int kValueElements = Traits::kTileK * Traits::kValueDim;
  static constexpr int kQueryElements = Traits::kTileQ * Traits::kHeadDim;  // of one tensor

  alignas(1024) Element q[Traits::kQueryTensors * kQueryElements];
  alignas(1024) Element k[Traits::kStages * kKeyElements];
  alignas(1024) Element v[Traits::kStages * kValueElements];
  alignas(1024) Element out_own[Traits::kOutputReplacesQ ? 1 : Traits::kTileQ * Traits::kValueDim];

  Ring<1> ring_q[Traits::kConsumers];  // one per warpgroup, for its 64 rows
  Ring<Traits::kStages> ring_k;
  Ring<Traits::kStages> ring_v;
  WorkSlot<typename Geometry::Work> work;
  typename Geometry::Shared geometry;
  KeyBiases<Traits> key_biases;

  __device__ __forceinline__ Element* out() { return Traits::kOutputReplacesQ ? q : out_own; }
};

}  // namespace sparse_fmha::sm90
