// The op of block lists: its additions to the common problem.
#include <torch/csrc/stable/ops.h>

#include "backward.h"
#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"
#include "score_arguments.h"

namespace sparse_fmha {
namespace {

// Address alignment of bulk copies, in bytes.
constexpr int64_t kCopyAlignment = 16;

// The problem points into the tensors, which must live until the launch. Bits that bulk copies
// cannot read in place are replaced by a copy.
FmhaProblem block_sparse(Tensor& q, Tensor& k, Tensor& v, Tensor const& counts,
                         Tensor const& indices, std::optional<Tensor> const& partial_counts,
                         std::optional<Tensor> const& partial_indices,
                         std::optional<Tensor>& partial_bits, int64_t block_q, int64_t block_kv,
                         bool causal, std::optional<double> scale, std::optional<Tensor>& key_bias,
                         std::optional<Tensor>& row_threshold, double softcap) {
  FmhaProblem problem = make_problem(q, k, v, /*axes=*/1, scale);
  add_softcap(problem, softcap);
  add_key_bias(problem, q, key_bias);
  add_row_threshold(problem, q, row_threshold);
  require(block_q == 64 || block_q == 128, "block_q must be 64 or 128, got ", block_q);
  require(block_kv == 16 || block_kv == 32 || block_kv == 64 || block_kv == 128,
          "block_kv must be 16, 32, 64 or 128, got ", block_kv);
  BlockSparse::Params params = {};
  params.len_q = problem.grid_q[kGridAxes - 1];
  params.len_kv = problem.grid_kv[kGridAxes - 1];
  params.block_q = static_cast<int32_t>(block_q);
  params.block_kv = static_cast<int32_t>(block_kv);
  params.causal = causal;
  require(params.len_kv <= (1 << 30), "k must have at most 2^30 tokens, got ", params.len_kv);

  require(counts.dim() == 3,
          "counts must have 3 dimensions (batch or 1, heads or 1, query blocks), got shape ",
          shape_of(counts));
  int64_t const batch = check_shared("counts", "batch", counts.size(0), problem.batch);
  int64_t const heads = check_shared("counts", "head", counts.size(1), problem.heads_q);
  int64_t const blocks = (params.len_q + block_q - 1) / block_q;
  check_list("counts", counts, ScalarType::Int, {batch, heads, blocks}, q);
  check_list("indices", indices, ScalarType::Int, {batch, heads, blocks, -1}, q);
  params.full = lists_of("indices", counts, indices);
  require(partial_counts.has_value() == partial_indices.has_value() &&
              partial_counts.has_value() == partial_bits.has_value(),
          "partial_counts, partial_indices and partial_bits must be given all or none, got some");
  if (partial_counts) {
    int64_t const width = partial_indices->dim() == 4 ? partial_indices->size(3) : -1;
    check_list("partial_counts", *partial_counts, ScalarType::Int, {batch, heads, blocks}, q);
    check_list("partial_indices", *partial_indices, ScalarType::Int, {batch, heads, blocks, -1}, q);
    check_list("partial_bits", *partial_bits, ScalarType::Byte,
               {batch, heads, blocks, width, block_q, block_kv / 8}, q);
    if (on_gpu(*partial_bits) && !is_aligned(*partial_bits, kCopyAlignment)) {
      partial_bits = torch::stable::clone(*partial_bits);
    }
    params.partial = lists_of("partial_indices", *partial_counts, *partial_indices);
    params.bits = static_cast<uint8_t const*>(partial_bits->data_ptr());
  }
  params.head_stride = heads == 1 ? 0 : blocks;
  params.batch_stride = batch == 1 ? 0 : heads * blocks;
  problem.sparsity = params;
  return problem;
}

std::vector<Tensor> block_sparse_fwd(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices,
                                     std::optional<Tensor> partial_counts,
                                     std::optional<Tensor> partial_indices,
                                     std::optional<Tensor> partial_bits, int64_t block_q,
                                     int64_t block_kv, bool causal, std::optional<double> scale,
                                     std::optional<Tensor> skip_threshold,
                                     std::optional<Tensor> key_bias,
                                     std::optional<Tensor> row_threshold, double softcap,
                                     bool save_skipped) {
  FmhaProblem problem =
      block_sparse(q, k, v, counts, indices, partial_counts, partial_indices, partial_bits, block_q,
                   block_kv, causal, scale, key_bias, row_threshold, softcap);
  return run(problem, q, skip_threshold, save_skipped);
}

std::vector<Tensor> block_sparse_bwd(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor counts, Tensor indices, std::optional<Tensor> partial_counts,
    std::optional<Tensor> partial_indices, std::optional<Tensor> partial_bits, int64_t block_q,
    int64_t block_kv, bool causal, std::optional<double> scale, std::optional<Tensor> key_bias,
    std::optional<Tensor> row_threshold, bool need_dq, bool need_dkv, bool need_dbias,
    bool deterministic, std::optional<Tensor> skip_threshold, double softcap,
    std::optional<Tensor> skipped) {
  FmhaProblem problem =
      block_sparse(q, k, v, counts, indices, partial_counts, partial_indices, partial_bits, block_q,
                   block_kv, causal, scale, key_bias, row_threshold, softcap);
  return run_backward(problem, q, k, v, std::nullopt, std::nullopt,
                      {dout, dlse, out, lse, need_dq, need_dkv, need_dbias, deterministic,
                       skip_threshold, skipped});
}

}  // namespace

SPARSE_FMHA_OP(block_sparse_fwd,
               "(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices,"
               " Tensor? partial_counts, Tensor? partial_indices, Tensor? partial_bits,"
               " int block_q, int block_kv, bool causal=False, float? scale=None,"
               " Tensor? skip_threshold=None,"
               " Tensor? key_bias=None, Tensor? row_threshold=None, float softcap=0.0,"
               " bool save_skipped=False) -> Tensor[]")
SPARSE_FMHA_OP(block_sparse_bwd,
               "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
               " Tensor counts, Tensor indices, Tensor? partial_counts, Tensor? partial_indices,"
               " Tensor? partial_bits, int block_q, int block_kv, bool causal=False,"
               " float? scale=None, Tensor? key_bias=None, Tensor? row_threshold=None,"
               " bool need_dq=True, bool need_dkv=True, bool need_dbias=True,"
               " bool deterministic=False, Tensor? skip_threshold=None, float softcap=0.0,"
               " Tensor? skipped=None) -> Tensor[]")

}  // namespace sparse_fmha
