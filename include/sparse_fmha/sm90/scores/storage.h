// Shared memory and parameters of a kernel that reduces scores.
#pragma once

#include <cuda.h>

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/scores/traits.h"

namespace sparse_fmha::sm90 {

struct ScoreParams {
  CUtensorMap held;  // in boxes of its tile, like `streamed`
  CUtensorMap streamed;
  Scheduler scheduler;  // its query tiles are tiles of the held operand, times parts
  int32_t parts;        // into which a stream is cut
  int32_t heads_per_kv;
  int32_t len_q;
  int32_t len_kv;
  int32_t shift;  // query i sees key j if j <= i + shift
  float scale_log2;
  bool negate;  // the scale is negative
  float const* lse;
  int32_t block_q;
  int32_t block_kv;
  float* result;
};

// What a thread block computes: a tile of the held operand against a range of streamed tiles.
struct ScoreWork {
  int32_t held;  // tile
  int32_t part;
  int32_t head;  // of queries
  int32_t batch;
  int32_t begin;  // streamed tiles
  int32_t end;

  // Of [B, heads_q, ...].
  __device__ __forceinline__ int64_t list(ScoreParams const& params) const {
    return int64_t{batch} * params.scheduler.heads + head;
  }
};

// The log-sum-exp of a query in log2 units; +inf if the query does not exist or sees nothing.
__device__ __forceinline__ float lse_log2(ScoreParams const& params, ScoreWork const& work,
                                          int32_t query) {
  constexpr float kLog2e = 1.44269504088896340736f;
  if (query >= params.len_q) {
    return INFINITY;
  }
  float const lse = params.lse[work.list(params) * params.len_q + query];
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// Shared: the reduction's own.
template <class Traits, class Shared>
struct ScoreStorage {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = kScoreTile * Traits::kHeadDim;

  alignas(1024) Element held[Traits::kHeld * Traits::kHeadDim];
  alignas(1024) Element streamed[Traits::kStages * kTileElements];
  alignas(16) float terms[Traits::kStages][kScoreTile];  // of streamed queries: lse, log2 units
  Shared own;
  Ring<1> ring_held;
  Ring<Traits::kStages> ring;
};

}  // namespace sparse_fmha::sm90
