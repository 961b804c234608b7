// The op of stripes: its additions to the common problem.
#include "backward.h"
#include "check.h"
#include "list_arguments.h"
#include "register.h"
#include "run.h"
#include "score_arguments.h"

namespace sparse_fmha {
namespace {

FmhaProblem stripe(Tensor& q, Tensor& k, Tensor& v, Tensor const& columns, Tensor const& counts,
                   std::optional<Tensor> const& range_starts,
                   std::optional<Tensor> const& range_counts, int64_t block_q, int64_t range_size,
                   bool causal, std::optional<double> scale, std::optional<Tensor>& key_bias,
                   std::optional<Tensor>& row_threshold, double softcap) {
  FmhaProblem problem = make_problem(q, k, v, /*axes=*/1, scale);
  add_softcap(problem, softcap);
  add_key_bias(problem, q, key_bias);
  add_row_threshold(problem, q, row_threshold);
  require(block_q >= 64 && block_q <= 2048 && block_q % 64 == 0,
          "block_q must be a multiple of 64 from 64 to 2048, got ", block_q);
  require(range_size == 64 || range_size == 128, "range_size must be 64 or 128, got ", range_size);
  Stripe::Params params = {};
  params.len_q = problem.grid_q[kGridAxes - 1];
  params.len_kv = problem.grid_kv[kGridAxes - 1];
  params.block_q = static_cast<int32_t>(block_q);
  params.range_size = static_cast<int32_t>(range_size);
  params.causal = causal;
  require(params.len_kv <= (1 << 30), "k must have at most 2^30 tokens, got ", params.len_kv);

  require(counts.dim() == 3,
          "counts must have 3 dimensions (batch or 1, heads or 1, groups of queries), got shape ",
          shape_of(counts));
  int64_t const batch = check_shared("counts", "batch", counts.size(0), problem.batch);
  int64_t const heads = check_shared("counts", "head", counts.size(1), problem.heads_q);
  int64_t const groups = (params.len_q + block_q - 1) / block_q;
  check_list("counts", counts, ScalarType::Int, {batch, heads, groups}, q);
  check_list("columns", columns, ScalarType::Int, {batch, heads, groups, -1}, q);
  params.columns = lists_of("columns", counts, columns);
  require(range_starts.has_value() == range_counts.has_value(),
          range_starts ? "range_counts must be given with range_starts"
                       : "range_starts must be given with range_counts",
          ", got only the latter");
  if (range_starts) {
    check_list("range_counts", *range_counts, ScalarType::Int, {batch, heads, groups}, q);
    check_list("range_starts", *range_starts, ScalarType::Int, {batch, heads, groups, -1}, q);
    params.ranges = lists_of("range_starts", *range_counts, *range_starts);
  }
  params.head_stride = heads == 1 ? 0 : groups;
  params.batch_stride = batch == 1 ? 0 : heads * groups;
  problem.sparsity = params;
  return problem;
}

std::vector<Tensor> stripe_fwd(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor counts,
                               std::optional<Tensor> range_starts,
                               std::optional<Tensor> range_counts, int64_t block_q,
                               int64_t range_size, bool causal, std::optional<double> scale,
                               std::optional<Tensor> skip_threshold, std::optional<Tensor> key_bias,
                               std::optional<Tensor> row_threshold, double softcap,
                               bool save_skipped) {
  FmhaProblem problem = stripe(q, k, v, columns, counts, range_starts, range_counts, block_q,
                               range_size, causal, scale, key_bias, row_threshold, softcap);
  return run(problem, q, skip_threshold, save_skipped);
}

std::vector<Tensor> stripe_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                               Tensor v, Tensor out, Tensor lse, Tensor columns, Tensor counts,
                               std::optional<Tensor> range_starts,
                               std::optional<Tensor> range_counts, int64_t block_q,
                               int64_t range_size, bool causal, std::optional<double> scale,
                               std::optional<Tensor> key_bias, std::optional<Tensor> row_threshold,
                               bool need_dq, bool need_dkv, bool need_dbias, bool deterministic,
                               std::optional<Tensor> skip_threshold, double softcap,
                               std::optional<Tensor> skipped) {
  FmhaProblem problem = stripe(q, k, v, columns, counts, range_starts, range_counts, block_q,
                               range_size, causal, scale, key_bias, row_threshold, softcap);
  return run_backward(problem, q, k, v, std::nullopt, std::nullopt,
                      {dout, dlse, out, lse, need_dq, need_dkv, need_dbias, deterministic,
                       skip_threshold, skipped});
}

}  // namespace

SPARSE_FMHA_OP(stripe_fwd,
               "(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor counts,"
               " Tensor? range_starts, Tensor? range_counts, int block_q, int range_size=64,"
               " bool causal=False, float? scale=None, Tensor? skip_threshold=None,"
               " Tensor? key_bias=None, Tensor? row_threshold=None, float softcap=0.0,"
               " bool save_skipped=False) -> Tensor[]")
SPARSE_FMHA_OP(stripe_bwd,
               "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
               " Tensor columns, Tensor counts, Tensor? range_starts, Tensor? range_counts,"
               " int block_q, int range_size=64, bool causal=False, float? scale=None,"
               " Tensor? key_bias=None, Tensor? row_threshold=None, bool need_dq=True,"
               " bool need_dkv=True, bool need_dbias=True, bool deterministic=False,"
               " Tensor? skip_threshold=None, float softcap=0.0, Tensor? skipped=None) -> Tensor[]")

}  // namespace sparse_fmha
