// The ops that reduce attention probabilities without their map (sparse_fmha/core/scores.h).
#include "sparse_fmha/core/scores.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"

namespace sparse_fmha {
namespace {

ScoreProblem make_score_problem(Tensor& q, Tensor& k, bool causal, double scale) {
  FmhaProblem const p = make_problem(q, k, k, /*axes=*/1, scale);
  for (auto const& [name, length] : {std::pair{"q", q.size(1)}, {"k", k.size(1)}}) {
    require(length <= ScoreProblem::kMostTokens, name, " must have at most 2^29 tokens, got ",
            length);
  }
  return {p.dtype,
          p.batch,
          p.heads_q,
          p.heads_kv,
          p.head_dim,
          static_cast<int32_t>(q.size(1)),
          static_cast<int32_t>(k.size(1)),
          p.q,
          p.k,
          p.scale,
          causal};
}

void add_lse(ScoreProblem& problem, Tensor const& lse, Tensor const& q) {
  check_list("lse", lse, ScalarType::Float, {problem.batch, problem.heads_q, problem.len_q}, q);
  problem.lse = static_cast<float const*>(lse.data_ptr());
}

int32_t checked_block(char const* name, int64_t block) {
  bool fits = false;
  for (int64_t size = ScoreProblem::kSmallestBlock; size <= ScoreProblem::kLargestBlock;
       size *= 2) {
    fits |= block == size;
  }
  require(fits, name, " must be 16, 32, 64 or 128, got ", block);
  return static_cast<int32_t>(block);
}

// The result on q's device. `nothing`: what it holds where there are no pairs.
Tensor reduce(ScoreReduction reduction, ScoreProblem& problem, Tensor const& q,
              std::vector<int64_t> const& sizes, double nothing) {
  ScoreKernels const& kernels = find_score_kernels(arch_of(q), problem.dtype, problem.head_dim);
  DeviceScope const scope(q);
  Tensor result = new_tensor(q, sizes, ScalarType::Float);
  if (result.numel() == 0) {
    return result;
  }
  bool const no_pairs = problem.len_q == 0 || problem.len_kv == 0;
  if (no_pairs || reduction == ScoreReduction::kDiagonals) {
    torch::stable::fill_(result, nothing);
  }
  if (no_pairs) {
    return result;
  }
  problem.result = static_cast<float*>(result.data_ptr());
  Launch const launch(q);
  kernels.run(reduction, problem, launch.context());
  return result;
}

Tensor score_rows(Tensor q, Tensor k, bool causal, int64_t parts, double scale) {
  ScoreProblem problem = make_score_problem(q, k, causal, scale);
  constexpr int64_t kMostParts = 1 << 16;
  require(parts >= 1 && parts <= kMostParts, "parts must be from 1 to 2^16, got ", parts);
  problem.parts = static_cast<int32_t>(parts);
  return reduce(ScoreReduction::kRows, problem, q, {q.size(0), q.size(2), parts, q.size(1)},
                -std::numeric_limits<double>::infinity());
}

Tensor score_columns(Tensor q, Tensor k, Tensor lse, bool causal, double scale) {
  ScoreProblem problem = make_score_problem(q, k, causal, scale);
  add_lse(problem, lse, q);
  return reduce(ScoreReduction::kColumns, problem, q, {q.size(0), q.size(2), k.size(1)}, 0.0);
}

// Two tensors that are to be added; causal.
Tensor score_diagonals(Tensor q, Tensor k, Tensor lse, double scale) {
  ScoreProblem problem = make_score_problem(q, k, /*causal=*/true, scale);
  add_lse(problem, lse, q);
  require(problem.len_q <= ScoreProblem::kMostDiagonalRows, "q must have at most ",
          ScoreProblem::kMostDiagonalRows, " tokens, got ", problem.len_q);
  return reduce(ScoreReduction::kDiagonals, problem, q, {q.size(0), q.size(2), 2, k.size(1)}, 0.0);
}

Tensor reduce_blocks(ScoreReduction reduction, Tensor& q, Tensor& k, Tensor const& lse, bool causal,
                     int64_t block_q, int64_t block_kv, double scale) {
  ScoreProblem problem = make_score_problem(q, k, causal, scale);
  add_lse(problem, lse, q);
  problem.block_q = checked_block("block_q", block_q);
  problem.block_kv = checked_block("block_kv", block_kv);
  return reduce(reduction, problem, q,
                {q.size(0), q.size(2), ceil_div(problem.len_q, problem.block_q),
                 ceil_div(problem.len_kv, problem.block_kv)},
                0.0);
}

Tensor score_block_sums(Tensor q, Tensor k, Tensor lse, bool causal, int64_t block_q,
                        int64_t block_kv, double scale) {
  return reduce_blocks(ScoreReduction::kBlockSums, q, k, lse, causal, block_q, block_kv, scale);
}

Tensor score_block_maxima(Tensor q, Tensor k, Tensor lse, bool causal, int64_t block_q,
                          int64_t block_kv, double scale) {
  return reduce_blocks(ScoreReduction::kBlockMaxima, q, k, lse, causal, block_q, block_kv, scale);
}

}  // namespace

SPARSE_FMHA_OP(score_rows, "(Tensor q, Tensor k, bool causal, int parts, float scale) -> Tensor")

SPARSE_FMHA_OP(score_columns,
               "(Tensor q, Tensor k, Tensor lse, bool causal, float scale) -> Tensor")

SPARSE_FMHA_OP(score_diagonals, "(Tensor q, Tensor k, Tensor lse, float scale) -> Tensor")

SPARSE_FMHA_OP(score_block_sums,
               "(Tensor q, Tensor k, Tensor lse, bool causal, int block_q, int block_kv,"
               " float scale) -> Tensor")

SPARSE_FMHA_OP(score_block_maxima,
               "(Tensor q, Tensor k, Tensor lse, bool causal, int block_q, int block_kv,"
               " float scale) -> Tensor")

}  // namespace sparse_fmha
