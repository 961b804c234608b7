// The op of dense and causal attention.
#include "backward.h"
#include "register.h"
#include "run.h"
#include "score_arguments.h"

namespace sparse_fmha {
namespace {

FmhaProblem fmha(Tensor& q, Tensor& k, Tensor& v, bool causal, std::optional<double> scale,
                 std::optional<Tensor>& key_bias, double softcap) {
  FmhaProblem problem = make_problem(q, k, v, /*axes=*/1, scale);
  add_softcap(problem, softcap);
  add_key_bias(problem, q, key_bias);
  int32_t const len_q = problem.grid_q[kGridAxes - 1];
  int32_t const len_kv = problem.grid_kv[kGridAxes - 1];
  if (causal) {
    problem.sparsity = Causal::Params{len_q, len_kv};
  } else {
    problem.sparsity = Dense::Params{len_q, len_kv};
  }
  return problem;
}

std::vector<Tensor> fmha_fwd(Tensor q, Tensor k, Tensor v, bool causal, std::optional<double> scale,
                             std::optional<Tensor> skip_threshold, std::optional<Tensor> key_bias,
                             double softcap, bool save_skipped) {
  FmhaProblem problem = fmha(q, k, v, causal, scale, key_bias, softcap);
  return run(problem, q, skip_threshold, save_skipped);
}

std::vector<Tensor> fmha_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                             Tensor out, Tensor lse, bool causal, std::optional<double> scale,
                             std::optional<Tensor> key_bias, bool need_dq, bool need_dkv,
                             bool need_dbias, bool deterministic,
                             std::optional<Tensor> skip_threshold, double softcap,
                             std::optional<Tensor> skipped) {
  FmhaProblem problem = fmha(q, k, v, causal, scale, key_bias, softcap);
  return run_backward(problem, q, k, v, std::nullopt, std::nullopt,
                      {dout, dlse, out, lse, need_dq, need_dkv, need_dbias, deterministic,
                       skip_threshold, skipped});
}

}  // namespace

SPARSE_FMHA_OP(fmha_fwd,
               "(Tensor q, Tensor k, Tensor v, bool causal=False, float? scale=None,"
               " Tensor? skip_threshold=None, Tensor? key_bias=None, float softcap=0.0,"
               " bool save_skipped=False) -> Tensor[]")
SPARSE_FMHA_OP(fmha_bwd,
               "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
               " bool causal=False, float? scale=None, Tensor? key_bias=None, bool need_dq=True,"
               " bool need_dkv=True, bool need_dbias=True, bool deterministic=False,"
               " Tensor? skip_threshold=None, float softcap=0.0, Tensor? skipped=None) -> Tensor[]")

}  // namespace sparse_fmha
