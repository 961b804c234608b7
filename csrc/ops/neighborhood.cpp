// The op of neighborhoods: its additions to the common problem.
#include "backward.h"
#include "check.h"
#include "register.h"
#include "run.h"
#include "score_arguments.h"
#include "sparse_fmha/planning/fit_windows.h"

namespace sparse_fmha {
namespace {

// One entry for each of the user's axes, after the axes that a grid of rank 3 adds.
Coord per_axis(char const* name, std::vector<int64_t> const& values, int axes) {
  require(static_cast<int>(values.size()) == axes, name, " must have one entry for each of q's ",
          axes, " token axes, got ", values.size());
  Coord result = {1, 1, 1};
  for (int a = 0; a < axes; ++a) {
    require(values[a] >= 0 && values[a] <= INT32_MAX, name, "[", a,
            "] must be from 0 to 2^31 - 1, got ", values[a]);
    result[kGridAxes - axes + a] = static_cast<int32_t>(values[a]);
  }
  return result;
}

void check_neighborhood(Neighborhood::Params const& p, int axes) {
  for (int a = 0; a < axes; ++a) {
    int const g = kGridAxes - axes + a;
    require(p.dilation[g] >= 1, "dilation[", a, "] must be at least 1, got ", p.dilation[g]);
    require(p.window[g] >= 1, "window[", a, "] must be at least 1, got ", p.window[g]);
    bool const fits = p.causal[g] != 0
                          ? p.grid[g] > 0
                          : static_cast<int64_t>(p.window[g]) * p.dilation[g] <= p.grid[g];
    require(fits, "window[", a, "] * dilation[", a, "] must be at most the ", p.grid[g],
            " tokens of that axis, got ", p.window[g], " * ", p.dilation[g]);
    require(p.stride[g] >= 1 && p.stride[g] <= p.window[g], "stride[", a,
            "] must be from 1 to window[", a, "] = ", p.window[g], ", got ", p.stride[g]);
    require(p.causal[g] <= 1, "causal[", a, "] must be 0 or 1, got ", p.causal[g]);
  }
}

FmhaProblem neighborhood(Tensor& q, Tensor& k, Tensor& v, std::vector<int64_t> const& window,
                         std::vector<int64_t> const& stride, std::vector<int64_t> const& dilation,
                         std::vector<int64_t> const& causal, std::optional<double> scale,
                         std::optional<Tensor>& extra_k, std::optional<Tensor>& extra_v,
                         std::optional<Tensor>& key_bias, double softcap) {
  int const axes = static_cast<int>(q.dim()) - 3;
  require(axes >= 1 && axes <= kGridAxes,
          "q must have 4 to 6 dimensions (batch, 1 to 3 of tokens, heads, head dim), got shape ",
          shape_of(q));
  FmhaProblem problem = make_problem(q, k, v, axes, scale);
  require(problem.grid_q == problem.grid_kv, "k must have q's token axes, of shape ", shape_of(q),
          ", got shape ", shape_of(k));
  add_extra_tokens(problem, q, extra_k, extra_v);
  add_softcap(problem, softcap);
  add_key_bias(problem, q, key_bias);
  Neighborhood::Params params;
  params.grid = problem.grid_q;
  params.window = per_axis("window", window, axes);
  params.stride = per_axis("stride", stride, axes);
  params.dilation = per_axis("dilation", dilation, axes);
  params.causal = per_axis("causal", causal, axes);
  for (int a = 0; a < kGridAxes - axes; ++a) {
    params.causal[a] = 0;
  }
  check_neighborhood(params, axes);
  fit_windows(params);
  problem.sparsity = params;
  return problem;
}

std::vector<Tensor> neighborhood_fwd(Tensor q, Tensor k, Tensor v, std::vector<int64_t> window,
                                     std::vector<int64_t> stride, std::vector<int64_t> dilation,
                                     std::vector<int64_t> causal, std::optional<double> scale,
                                     std::optional<Tensor> extra_k, std::optional<Tensor> extra_v,
                                     std::optional<Tensor> skip_threshold,
                                     std::optional<Tensor> key_bias, double softcap,
                                     bool save_skipped) {
  FmhaProblem problem = neighborhood(q, k, v, window, stride, dilation, causal, scale, extra_k,
                                     extra_v, key_bias, softcap);
  return run(problem, q, skip_threshold, save_skipped);
}

void neighborhood_out(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                      std::vector<int64_t> window, std::vector<int64_t> stride,
                      std::vector<int64_t> dilation, std::vector<int64_t> causal,
                      std::optional<double> scale) {
  std::optional<Tensor> none;
  FmhaProblem problem =
      neighborhood(q, k, v, window, stride, dilation, causal, scale, none, none, none, 0.0);
  run_into(problem, q, out, lse);
}

std::vector<Tensor> neighborhood_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                     Tensor v, Tensor out, Tensor lse, std::vector<int64_t> window,
                                     std::vector<int64_t> stride, std::vector<int64_t> dilation,
                                     std::vector<int64_t> causal, std::optional<double> scale,
                                     std::optional<Tensor> extra_k, std::optional<Tensor> extra_v,
                                     std::optional<Tensor> key_bias, bool need_dq, bool need_dkv,
                                     bool need_dbias, bool deterministic,
                                     std::optional<Tensor> skip_threshold, double softcap,
                                     std::optional<Tensor> skipped) {
  FmhaProblem problem = neighborhood(q, k, v, window, stride, dilation, causal, scale, extra_k,
                                     extra_v, key_bias, softcap);
  return run_backward(problem, q, k, v, extra_k, extra_v,
                      {dout, dlse, out, lse, need_dq, need_dkv, need_dbias, deterministic,
                       skip_threshold, skipped});
}

}  // namespace

SPARSE_FMHA_OP(neighborhood_fwd,
               "(Tensor q, Tensor k, Tensor v, SymInt[] window, SymInt[] stride, SymInt[] dilation,"
               " int[] causal, float? scale=None, Tensor? extra_k=None, Tensor? extra_v=None,"
               " Tensor? skip_threshold=None, Tensor? key_bias=None, float softcap=0.0,"
               " bool save_skipped=False) -> Tensor[]")
SPARSE_FMHA_OP(neighborhood_out,
               "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, SymInt[] window,"
               " SymInt[] stride, SymInt[] dilation, int[] causal, float? scale=None) -> ()")
SPARSE_FMHA_OP(neighborhood_bwd,
               "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
               " SymInt[] window, SymInt[] stride, SymInt[] dilation, int[] causal,"
               " float? scale=None, Tensor? extra_k=None, Tensor? extra_v=None,"
               " Tensor? key_bias=None, bool need_dq=True, bool need_dkv=True,"
               " bool need_dbias=True, bool deterministic=False, Tensor? skip_threshold=None, "
               "float softcap=0.0, Tensor? skipped=None) -> Tensor[]")

}  // namespace sparse_fmha
