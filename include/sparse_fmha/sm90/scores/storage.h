// Shared memory and parameters of a kernel that reduces scores.
#pragma once

#include <cuda.h>

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/scores/traits.h"

namespace sparse_fmha::sm90 {

struct ScoreParams {
  CUtensorMap held;  // in boxes of a tile, like `streamed`
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

// Maxima or sums of blocks of 16 x 16, until there are enough of them to be stored together.
struct BlockValues {
  static constexpr int kSide = 16;
  static constexpr int kSteps = 16;
  float of[2][8][kSteps * 8];  // [buffer][rows][columns]
};

template <class Traits>
struct ScoreStorage {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = Traits::kTile * Traits::kHeadDim;

  alignas(1024) Element held[kTileElements];
  alignas(1024) Element streamed[Traits::kStages * kTileElements];
  alignas(16) float terms[Traits::kStages][Traits::kTile];  // of streamed queries: lse, log2 units
  BlockValues blocks;
  Ring<1> ring_held;
  Ring<Traits::kStages> ring;
};

}  // namespace sparse_fmha::sm90
