// Biases of keys in the dK/dV kernel: consumers add them to scores, and sum their gradients.
//
// A thread has the scores of two keys. Their biases and the sums lie in shared memory, in a place
// of each thread's own, because registers are scarce and nobody else reads them.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/key_bias.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/soft_cap.h"

namespace sparse_fmha::sm90 {

struct DkvBiasParams {
  BiasParams from = {};        // no data: keys have no bias
  float* gradients = nullptr;  // [B, heads_q, keys]; nullptr: not wanted
  int64_t batch_stride = 0;    // of the gradients
  int64_t head_stride = 0;
};

// The biases of the keys {first + i * step} of a grid, from batch entry `batch` on.
inline DkvBiasParams bias_params(FmhaProblem const& p, Coord const& first = {0, 0, 0},
                                 Coord const& step = {1, 1, 1}, int32_t batch = 0) {
  DkvBiasParams params;
  if (p.key_bias.data == nullptr) {
    return params;
  }
  params.from.keys = p.key_bias;
  params.from.rows = p.row_threshold;
  params.head_stride = volume(p.grid_kv);
  params.batch_stride = p.heads_q * params.head_stride;
  int64_t offset = 0;
  int64_t key = 1;
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    offset += first[axis] * key;
    params.from.axis_stride[axis] = step[axis] * key;
    key *= p.grid_kv[axis];
  }
  params.from.keys.data += offset + batch * p.key_bias.batch_stride;
  if (p.gradients->key_bias != nullptr) {
    params.gradients = p.gradients->key_bias + offset + batch * params.batch_stride;
  }
  return params;
}

// A member of a block's shared memory; empty if the kernel takes no bias.
template <class Traits, bool = Traits::kKeyBias>
struct ThreadBiases {};
template <class Traits>
struct ThreadBiases<Traits, true> {
  float2 biases[Traits::kConsumerThreads];  // in log2 units
  float2 sums[Traits::kConsumerThreads];
};

// What a consumer does with biases and a soft cap: nothing if the call has none. kSums: it has the
// gradients of scores, and so those of the biases.
template <class Traits, class Geometry, class Params, class Storage, bool kSums,
          bool = Traits::kKeyBias>
struct DkvBias;

template <class Traits, class Geometry, class Params, class Storage, bool kSums>
struct DkvBias<Traits, Geometry, Params, Storage, kSums, true> {
  using Work = typename Geometry::Work;

  Params const& params;
  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  int const part;       // which 64 keys of the tile

  static constexpr float kMostWeight = 8.f;  // its log2; of rows in the tensor it is 1

  __device__ __forceinline__ bool given() const {
    return params.bias.from.keys.data != nullptr || params.soft_cap.given();
  }

  // Before the steps of a query head of the group.
  __device__ __forceinline__ void begin(Work const& work, int head) const {
    if (!given()) {
      return;
    }
    auto const& from = params.bias.from.keys;
    float const* const data =
        from.data + work.tile.batch * from.batch_stride + query_head(work, head) * from.head_stride;
    float bias[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      int64_t const index = index_of(work, r);
      bool const has_bias = from.data != nullptr && index >= 0;
      bias[r] = has_bias ? bias_in_log2(__ldg(data + index)) : 0.f;
    }
    smem.biases.biases[thread()] = {bias[0], bias[1]};
    smem.biases.sums[thread()] = {0.f, 0.f};
  }

  // Replaces scores by `scale_log2` times the score, or what a cap makes of it, plus the bias of
  // the key, or -inf if that hides the key, whatever the score. `terms` are those of the thread's
  // columns: rows outside the tensor have zeros, with which a large bias would make an infinite
  // weight.
  template <class Scores>
  __device__ __forceinline__ void add(Scores& s, RowTerms const* terms) const {
    if (!given()) {
      return;
    }
    compiler_fence();  // not kept from one step to the next
    float2 const bias = smem.biases.biases[thread()];
    float const factor = params.soft_cap.apply(s, params.scale_log2);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      float const mine = AccumulatorPosition::row_of(i) == 0 ? bias.x : bias.y;
      float const most = terms[AccumulatorPosition::column_of(i)].lse_log2 + kMostWeight;
      float const sum = fminf(fmaf(s(i), factor, mine), most);
      s(i) = mine == -INFINITY ? mine : sum;
    }
  }

  // From gradients of capped scores to those of the scores. There are no registers to keep capped
  // scores, but the logarithm of a weight has them.
  template <class Scores>
  __device__ __forceinline__ void uncap(Scores& grads, Scores const& weights,
                                        RowTerms const* terms) const {
    SoftCap const& cap = params.soft_cap;
    if (!cap.given()) {
      return;
    }
    compiler_fence();
    float2 const bias = smem.biases.biases[thread()];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) {
      float const lse = terms[AccumulatorPosition::column_of(i)].lse_log2;
      float const mine = AccumulatorPosition::row_of(i) == 0 ? bias.x : bias.y;
      grads(i) *= SoftCap::slope((log2_approx(weights(i)) + (lse - mine)) * cap.inverse);
    }
  }

  // Adds the gradients of a step's scores, which are those of the biases.
  template <class Scores>
  __device__ __forceinline__ void sum(Scores const& grads) const {
    if (!given()) {
      return;
    }
    compiler_fence();
    float2 sum = smem.biases.sums[thread()];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) {
      (AccumulatorPosition::row_of(i) == 0 ? sum.x : sum.y) += grads(i);
    }
    smem.biases.sums[thread()] = sum;
  }

  // After the steps of a query head, if there were any: stores the gradients.
  __device__ __forceinline__ void end(Work const& work, int head) const {
    if (!kSums || head < 0 || params.bias.gradients == nullptr) {
      return;
    }
    compiler_fence();
    float2 const mine = smem.biases.sums[thread()];
    float* const to = params.bias.gradients + work.tile.batch * params.bias.batch_stride +
                      query_head(work, head) * params.bias.head_stride;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = r == 0 ? mine.x : mine.y;
      sum += __shfl_xor_sync(0xffffffff, sum, 1);  // four threads have the same keys
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      int64_t const index = index_of(work, r);
      if (threadIdx.x % 4 == 0 && index >= 0) {
        to[index] = sum;
      }
    }
  }

  // Before a step of the head `next`, after steps of `head` (-1: none).
  __device__ __forceinline__ void enter(Work const& work, int& head, int next) const {
    if (next != head) {
      end(work, head);
      head = next;
      begin(work, head);
    }
  }
  // The same if each head has `tiles` steps, in ascending order, before the step with this number
  // over all heads.
  __device__ __forceinline__ void follow(Work const& work, int number, int tile, int tiles) const {
    if (tile == 0 && given()) {
      int const head = number / tiles;
      end(work, head - 1);
      begin(work, head);
    }
  }

 private:
  __device__ __forceinline__ int thread() const {
    return warpgroup * 128 + static_cast<int>(threadIdx.x % 128);
  }
  __device__ __forceinline__ int64_t query_head(Work const& work, int head) const {
    return work.tile.head * params.heads_per_kv + head;
  }
  __device__ __forceinline__ int64_t index_of(Work const& work, int r) const {
    return geometry.key_index(work, part * 64 + AccumulatorPosition().row + 8 * r);
  }
};

// A kernel that takes no bias.
template <class Traits, class Geometry, class Params, class Storage, bool kSums>
struct DkvBias<Traits, Geometry, Params, Storage, kSums, false> {
  using Work = typename Geometry::Work;

  Params const& params;
  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;
  int const part;

  static constexpr __device__ bool given() { return false; }
  __device__ __forceinline__ void begin(Work const& /*work*/, int /*head*/) const {}
  __device__ __forceinline__ void end(Work const& /*work*/, int /*head*/) const {}
  __device__ __forceinline__ void enter(Work const& /*work*/, int& /*head*/, int /*next*/) const {}
  __device__ __forceinline__ void follow(Work const& /*work*/, int /*number*/, int /*tile*/,
                                         int /*tiles*/) const {}
  template <class Scores>
  __device__ __forceinline__ void add(Scores& /*scores*/, RowTerms const* /*terms*/) const {}
  template <class Scores>
  __device__ __forceinline__ void uncap(Scores& /*grads*/, Scores const& /*weights*/,
                                        RowTerms const* /*terms*/) const {}
  template <class Scores>
  __device__ __forceinline__ void sum(Scores const& /*grads*/) const {}
};

}  // namespace sparse_fmha::sm90
