// The op of dense and causal attention.
#include "register.h"
#include "run.h"

namespace sparse_fmha {
namespace {

std::vector<Tensor> fmha_fwd(Tensor q, Tensor k, Tensor v, bool causal, std::optional<double> scale,
                             std::optional<Tensor> skip_threshold) {
  FmhaProblem problem = make_problem(q, k, v, /*axes=*/1, scale);
  int32_t const len_q = problem.grid_q[kGridAxes - 1];
  int32_t const len_kv = problem.grid_kv[kGridAxes - 1];
  if (causal) {
    problem.sparsity = Causal::Params{len_q, len_kv};
  } else {
    problem.sparsity = Dense::Params{len_q, len_kv};
  }
  return run(problem, q, skip_threshold);
}

}  // namespace

SPARSE_FMHA_OP(fmha_fwd,
               "(Tensor q, Tensor k, Tensor v, bool causal=False, float? scale=None,"
               " Tensor? skip_threshold=None) -> Tensor[]")

}  // namespace sparse_fmha
