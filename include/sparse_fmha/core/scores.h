// Reductions of attention probabilities without the map of all pairs, as plain data.
// python/sparse_fmha/selection/reductions.py defines them.
#pragma once

#include <vector>

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

enum class ScoreReduction : int32_t {
  kRows,         // log-sum-exp of each query's scores
  kColumns,      // sum over the queries of each key's probabilities
  kBlockSums,    // sum over a block
  kBlockMaxima,  // largest of a block
  kDiagonals,    // sum over the keys at one distance before their queries
};

struct ScoreProblem {
  static constexpr int32_t kMostTokens = 1 << 29;  // so that sums of two positions do not overflow
  static constexpr int32_t kMostDiagonalRows = 128;  // queries, of kDiagonals
  static constexpr int32_t kSmallestBlock = 16;      // blocks are this times 1, 2, 4 or 8
  static constexpr int32_t kLargestBlock = 128;

  DataType dtype;
  int32_t batch;
  int32_t heads_q;  // a multiple of heads_kv
  int32_t heads_kv;
  int32_t head_dim;  // a multiple of 8, at most 256
  int32_t len_q;     // 1 to kMostTokens, like len_kv
  int32_t len_kv;
  TensorView q;
  TensorView k;
  double scale;  // of q.k
  bool causal;   // query i sees key j only if j <= i + len_kv - len_q
  // kRows: into how many ranges of keys a row is cut. The result is [B, heads_q, parts, len_q].
  int32_t parts = 1;
  // The others: [B, heads_q, len_q], natural log; -inf: the row's probabilities are 0.
  float const* lse = nullptr;
  int32_t block_q = 0;  // of blocks; the last may be shorter
  int32_t block_kv = 0;
  // kColumns: [B, heads_q, len_kv]; of blocks [B, heads_q, blocks of queries, blocks of keys].
  // kDiagonals: two that are to be added, [B, heads_q, 2, len_kv], at s the keys s before each
  // query's own; not all of it is written.
  float* result = nullptr;
};

// Compiled kernels of one dtype, for head dims up to `head_dim`.
struct ScoreKernels {
  char const* name;  // sm90_scores_float16_d64
  Arch arch;
  DataType dtype;
  int32_t head_dim;
  void (*run)(ScoreReduction, ScoreProblem const&, ExecutionContext const&);
};

std::vector<ScoreKernels> const& score_kernel_table();

// Those with the smallest head dim that fits, or nullptr.
ScoreKernels const* look_for_score_kernels(Arch arch, DataType dtype, int32_t head_dim);

// The same; throws not_implemented (errors.h) if there are none.
ScoreKernels const& find_score_kernels(Arch arch, DataType dtype, int32_t head_dim);

}  // namespace sparse_fmha
