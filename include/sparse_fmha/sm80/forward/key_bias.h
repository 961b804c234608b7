// Biases of keys: copied with the tile that the keys are in, and added to its scores.
//
// Every kernel takes calls with and without biases: it tests a pointer once a tile. With biases,
// scores are scaled when they get theirs, and the exponential's factor is 1.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/key_bias.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

// Those of the keys of the tile that is computed and of the next, in natural units.
template <int kKeys>
struct KeyBiases {
  alignas(16) float of[2][kKeys];
  float const* head;  // the biases of the head; here, because registers are scarce

  __device__ __forceinline__ float const* tile(int i) const { return of[i % 2]; }

  // By one thread; all wait before they copy.
  __device__ __forceinline__ void choose_head(TokenNumbers const& from, WorkTile const& work) {
    head = from.data + work.batch * from.batch_stride + work.head * from.head_stride;
  }
  // Called by all threads before they commit the copies of tile i; returns with these in flight.
  // index_of(r): the index of the r-th key among those of its head; negative if there is none, or
  // it has no bias.
  template <class Traits, class IndexOf>
  __device__ __forceinline__ void copy(float const* data, int i, IndexOf const& index_of) {
    CUTE_NO_UNROLL
    for (int r = threadIdx.x; r < kKeys; r += Traits::kThreads) {
      int64_t const index = index_of(r);
      cutlass::arch::cp_async_zfill<4, cutlass::arch::CacheOperation::Always>(
          of[i % 2] + r, data + (index < 0 ? 0 : index), index >= 0);
    }
  }
};

// A score in log2 units with its bias, which hides the key if it is -inf, whatever the score.
__device__ __forceinline__ float biased(float score, float scale_log2, float bias_log2) {
  return bias_log2 == -INFINITY ? bias_log2 : fmaf(score, scale_log2, bias_log2);
}

// Calls body(n, bias) for every eight of kColumns columns, with the biases in log2 units of the
// thread's two, which `biases` begins with. Loads are volatile, so that they are not kept from one
// call to the next: registers are scarce.
template <int kColumns, class Body>
__device__ __forceinline__ void visit_biases(float const* biases, Body const& body) {
  uint32_t const address = cute::cast_smem_ptr_to_uint(biases);
  CUTE_UNROLL
  for (int n = 0; n < kColumns / 8; ++n) {
    float bias[2];
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(bias[0]), "=f"(bias[1])
                 : "r"(address + 32 * n));
    bias[0] = bias_in_log2(bias[0]);
    bias[1] = bias_in_log2(bias[1]);
    body(n, bias);
  }
}

}  // namespace sparse_fmha::sm80
