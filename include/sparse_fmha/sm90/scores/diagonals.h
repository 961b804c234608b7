// Sums along diagonals, of at most 128 queries. A thread block has one tile of keys.
//
// Query i of the tile and key c of the tile are on the diagonal s = i - c + offset. A tile has 128
// diagonals with i >= c, which are those with i < c of the tile before. So there are two results,
// one for each kind: each number has one owner, and whoever reads them adds the two.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/scores/held.h"

namespace sparse_fmha::sm90 {

// The probabilities of a tile.
struct TileWeights {
  static constexpr int kPitch = kScoreTile + 8;  // stores of pairs then meet all banks
  alignas(16) float of[kScoreTile][kPitch];      // [query][key]
};

struct DiagonalSums {
  using Held = QueriesHeld<kScoreTile>;
  using Shared = TileWeights;
  static constexpr bool kTerms = false;

  ScoreParams const& params;
  ScoreWork const work;
  int32_t const row;
  TileWeights& weights;
  float lse[kRowsPerThread];

  __device__ __forceinline__ DiagonalSums(ScoreParams const& p, ScoreWork const& w, int32_t r,
                                          TileWeights& shared)
      : params(p), work(w), row(r), weights(shared) {
    CUTE_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) {
      lse[i] = lse_log2(p, w, row + 8 * i);
    }
  }
  template <class Scores>
  __device__ __forceinline__ void take(Scores& scores, float const* /*terms*/) {
    int const column = AccumulatorPosition{}.column;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); i += 2) {
      int const r = AccumulatorPosition::row_of(i);
      float2 const pair = {exp2_approx(fmaf(scores(i), params.scale_log2, -lse[r])),
                           exp2_approx(fmaf(scores(i + 1), params.scale_log2, -lse[r]))};
      float* const to = &weights.of[row + 8 * r][column + AccumulatorPosition::column_of(i)];
      *reinterpret_cast<float2*>(to) = pair;
    }
    cutlass::arch::NamedBarrier::sync(2 * kScoreTile, 1);
    add_up();
  }
  __device__ __forceinline__ void finish() {}

 private:
  // A thread of the first consumer adds up one diagonal with i >= c, one of the second one the
  // diagonal with i < c that continues it at the other end: neighboring threads read neighboring
  // keys of a query.
  __device__ __forceinline__ void add_up() const {
    int const first = threadIdx.x % kScoreTile;
    bool const later = threadIdx.x >= 2 * kScoreTile;  // i < c; the producer's threads come first
    int const begin = later ? 0 : first;
    int const end = later ? first : kScoreTile;
    float sum = 0.f;
#pragma unroll 4
    for (int i = begin; i < end; ++i) {
      sum += weights.of[i][(i - first) & (kScoreTile - 1)];
    }
    int32_t const offset = params.shift - work.begin * kScoreTile;
    int32_t const s = offset + first - (later ? kScoreTile : 0);
    if (s >= 0 && s < params.len_kv) {
      params.result[(work.list(params) * 2 + later) * params.len_kv + s] = sum;
    }
  }
};

}  // namespace sparse_fmha::sm90
