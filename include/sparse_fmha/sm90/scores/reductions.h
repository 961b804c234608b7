// What becomes of scores. A reduction is of one consumer thread:
//
//   Held            which operand is held (held.h)
//   kTerms          whether streamed queries bring their log-sum-exp
//   Shared          what it has in shared memory
//   (params, work, row, shared)  begins; `row` is the thread's first of the held tile
//   take(scores, terms)       of a tile; terms: of the thread's first column
//   finish()                  stores the result
//
// A hidden score is -inf.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/scores/block_values.h"
#include "sparse_fmha/sm90/scores/held.h"

namespace sparse_fmha::sm90 {

struct NothingShared {};

// Log-sum-exp of each query.
template <int kRows>
struct RowSums {
  using Shared = NothingShared;
  using Held = QueriesHeld<kRows>;
  static constexpr bool kTerms = false;

  ScoreParams const& params;
  ScoreWork const work;
  int32_t const row;
  OnlineSoftmax softmax;

  __device__ __forceinline__ RowSums(ScoreParams const& p, ScoreWork const& w, int32_t r,
                                     Shared& /*shared*/)
      : params(p), work(w), row(r), softmax(p.scale_log2) {}

  template <class Scores>
  __device__ __forceinline__ void take(Scores& scores, float const* /*terms*/) {
    float rescale[kRowsPerThread];
    softmax.update<true>(scores, rescale);
  }
  __device__ __forceinline__ void finish() {
    float rescale[kRowsPerThread];
    float lse[kRowsPerThread];
    softmax.finish(rescale, lse);
    int64_t const list = work.list(params) * params.parts + work.part;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const query = work.held * kRows + row + 8 * r;
      if (threadIdx.x % 4 == 0 && query < params.len_q) {
        params.result[list * params.len_q + query] = lse[r];
      }
    }
  }
};

// Sums over the queries of each key. They stay in the key's registers, so their order is fixed.
template <int kRows>
struct ColumnSums {
  using Shared = NothingShared;
  using Held = KeysHeld<kRows>;
  static constexpr bool kTerms = true;

  ScoreParams const& params;
  ScoreWork const work;
  int32_t const row;
  float sum[kRowsPerThread] = {0.f, 0.f};

  __device__ __forceinline__ ColumnSums(ScoreParams const& p, ScoreWork const& w, int32_t r,
                                        Shared& /*shared*/)
      : params(p), work(w), row(r) {}

  template <class Scores>
  __device__ __forceinline__ void take(Scores& scores, float const* terms) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); i += 4) {
      float2 const lse =
          *reinterpret_cast<float2 const*>(terms + AccumulatorPosition::column_of(i));
      CUTE_UNROLL
      for (int j = i; j < i + 4; ++j) {
        scores(j) = exp2_approx(fmaf(scores(j), params.scale_log2, j % 2 == 0 ? -lse.x : -lse.y));
      }
    }
    float of_tile[kRowsPerThread];
    fold_rows(scores, of_tile, [](float a, float b) { return a + b; });
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      sum[r] += of_tile[r];
    }
  }
  __device__ __forceinline__ void finish() {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      float const total = reduce_quad(sum[r], [](float a, float b) { return a + b; });
      int32_t const key = work.held * kRows + row + 8 * r;
      if (threadIdx.x % 4 == 0 && key < params.len_kv) {
        params.result[work.list(params) * params.len_kv + key] = total;
      }
    }
  }
};

// Sums of probabilities of blocks.
struct SumOfBlock {
  static constexpr float kNone = 0.f;
  static __device__ __forceinline__ float of(float exponent) { return exp2_approx(exponent); }
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
  static __device__ __forceinline__ float result(float joined) { return joined; }
};
// The largest probability of a block has the largest exponent. NaN stays.
struct MaximumOfBlock {
  static constexpr float kNone = -INFINITY;
  static __device__ __forceinline__ float of(float exponent) { return exponent; }
  static __device__ __forceinline__ float join(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
  }
  static __device__ __forceinline__ float result(float joined) { return exp2_approx(joined); }
};

template <class Op, int kRows>
struct Blocks {
  using Shared = BlockValues<kRows>;
  using Held = QueriesHeld<kRows>;
  static constexpr bool kTerms = false;

  ScoreParams const& params;
  float lse[kRowsPerThread];  // log2 units; +inf: probabilities are 0
  BlockWriter<Op, kRows> writer;

  __device__ __forceinline__ Blocks(ScoreParams const& p, ScoreWork const& w, int32_t row,
                                    Shared& blocks)
      : params(p), writer{p, w, blocks} {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const query = w.held * kRows + row + 8 * r;
      lse[r] = lse_log2(p, w, query);
    }
  }
  template <class Scores>
  __device__ __forceinline__ void take(Scores& scores, float const* /*terms*/) {
    static_assert(decltype(cute::size(scores))::value == 64, "eight blocks of 16 columns");
    float values[8];
    CUTE_UNROLL
    for (int g = 0; g < 8; ++g) {
      CUTE_UNROLL
      for (int i = 8 * g; i < 8 * g + 8; ++i) {
        int const r = AccumulatorPosition::row_of(i);
        float const x = Op::of(fmaf(scores(i), params.scale_log2, -lse[r]));
        values[g] = i == 8 * g ? x : Op::join(values[g], x);
      }
    }
    writer.put(values);
  }
  __device__ __forceinline__ void finish() { writer.finish(); }
};

}  // namespace sparse_fmha::sm90
