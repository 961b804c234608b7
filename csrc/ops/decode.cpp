// The op of decode attention: few queries over the keys of a cache.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "check.h"
#include "decode_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"
#include "score_arguments.h"
#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {
namespace {

using torch::headeronly::ScalarType;

// Checks q and the cache, and describes them.
FmhaProblem problem_of(Tensor& q, Tensor& k_cache, Tensor& v_cache, bool paged,
                       std::optional<double> scale) {
  require(on_cpu(q) || on_gpu(q), "q must be on cpu or cuda");
  FmhaProblem p;
  p.dtype = check_operand("q", q, 4);
  struct {
    char const* name;
    Tensor& tensor;
  } const caches[] = {{"k_cache", k_cache}, {"v_cache", v_cache}};
  int64_t const dim = q.size(3);
  for (auto const& [name, t] : caches) {
    check_like_q(name, t, q);
    check_operand(name, t, 4);
    require(t.size(3) == dim, name, " must have q's head dim, ", dim, ", got ", t.size(3));
  }
  require(same_shape(k_cache, v_cache), "v_cache must have k_cache's shape, ", shape_of(k_cache),
          ", got ", shape_of(v_cache));
  int64_t const heads_q = q.size(2);
  int64_t const heads_kv = k_cache.size(2);
  check_groups(heads_q, heads_kv, "k_cache and v_cache");
  require(paged || k_cache.size(0) == q.size(0),
          "k_cache must have q's batch without a page_table, ", q.size(0), ", got ",
          k_cache.size(0));
  require(q.size(0) <= INT32_MAX && q.size(1) <= INT32_MAX && q.size(1) * heads_q <= INT32_MAX,
          "q must have a batch, and tokens times heads, of at most 2^31 - 1, got shape ",
          shape_of(q));
  require(k_cache.size(0) <= INT32_MAX && k_cache.size(1) <= INT32_MAX,
          "k_cache must have first two sizes of at most 2^31 - 1, got shape ", shape_of(k_cache));
  p.scale = scale_of(scale, dim);
  p.batch = static_cast<int32_t>(q.size(0));
  p.heads_q = static_cast<int32_t>(heads_q);
  p.heads_kv = static_cast<int32_t>(heads_kv);
  p.head_dim = p.value_dim = static_cast<int32_t>(dim);
  p.grid_q = {1, 1, static_cast<int32_t>(q.size(1))};
  p.grid_kv = {1, 1, static_cast<int32_t>(k_cache.size(1))};
  p.q = view(q);
  p.k = view(k_cache);
  p.v = view(v_cache);
  return p;
}

void check_out(Tensor const& out, Tensor const& q) {
  require(same_shape(out, q), "out must have q's shape, ", shape_of(q), ", got ", shape_of(out));
  check_like_q("out", out, q);
  require(is_aligned(out, out.element_size()), "out must start at a multiple of ",
          out.element_size(), " bytes, the size of its elements");
  for (int64_t d = 0; d < out.dim() && out.numel() != 0; ++d) {
    bool const last = d + 1 == out.dim();
    require(out.size(d) == 1 || (last ? out.stride(d) == 1 : out.stride(d) != 0),
            "out must have a stride ", last ? "of 1" : "other than 0", " in dimension ", d,
            ", got ", out.stride(d));
  }
}

// Writes out; returns lse and the counts of tiles.
std::tuple<Tensor, Tensor> run_decode(FmhaProblem& problem, DecodeKeys const& keys, Tensor const& q,
                                      Tensor const& out,
                                      std::optional<Tensor> const& skip_threshold) {
  DeviceScope const scope(q);
  Tensor lse = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  Tensor tiles =
      new_tensor(q, {problem.batch, problem.heads_kv, skip_threshold ? 2 : 0}, ScalarType::Long);
  if (skip_threshold) {
    problem.skip_threshold = checked_threshold(*skip_threshold, q);
    torch::stable::fill_(tiles, 0.0);
    problem.skip_counts = static_cast<int64_t*>(tiles.data_ptr());
  }
  if (out.numel() == 0) {
    return {lse, tiles};
  }
  problem.decode = &keys;
  problem.out = view(out);
  problem.lse = static_cast<float*>(lse.data_ptr());
  Launch launch(q);
  kernel_for(problem, q, Pass::kDecode).launch(problem, launch.context());
  return {lse, tiles};
}

std::tuple<Tensor, Tensor> decode_out(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor out,
    std::optional<Tensor> page_table, std::optional<Tensor> block_indices,
    std::optional<Tensor> block_counts, int64_t block, std::optional<Tensor> token_indices,
    std::optional<Tensor> token_counts, std::optional<Tensor> head_starts,
    std::optional<Tensor> head_lengths, std::optional<Tensor> tree_mask, bool causal,
    std::optional<int64_t> window, std::optional<double> scale, std::optional<Tensor> sink,
    std::optional<Tensor> skip_threshold, std::optional<int64_t> split_tokens, double softcap) {
  FmhaProblem problem = problem_of(q, k_cache, v_cache, page_table.has_value(), scale);
  add_softcap(problem, softcap);
  check_out(out, q);
  DecodeKeys const keys = decode_keys(
      {seq_lens, page_table, block_indices, block_counts, block, token_indices, token_counts,
       head_starts, head_lengths, tree_mask, causal, window, sink, split_tokens},
      problem, q, k_cache);
  return run_decode(problem, keys, q, out, skip_threshold);
}

std::tuple<Tensor, Tensor, Tensor> decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, std::optional<Tensor> page_table,
    std::optional<Tensor> block_indices, std::optional<Tensor> block_counts, int64_t block,
    std::optional<Tensor> token_indices, std::optional<Tensor> token_counts,
    std::optional<Tensor> head_starts, std::optional<Tensor> head_lengths,
    std::optional<Tensor> tree_mask, bool causal, std::optional<int64_t> window,
    std::optional<double> scale, std::optional<Tensor> sink, std::optional<Tensor> skip_threshold,
    std::optional<int64_t> split_tokens, double softcap) {
  Tensor const out = new_tensor(q, sizes_of(q), q.scalar_type());
  auto const [lse, tiles] =
      decode_out(q, k_cache, v_cache, seq_lens, out, page_table, block_indices, block_counts, block,
                 token_indices, token_counts, head_starts, head_lengths, tree_mask, causal, window,
                 scale, sink, skip_threshold, split_tokens, softcap);
  return {out, lse, tiles};
}

}  // namespace

// The keys are one of: the whole cache (through page_table if it is given), block lists, token
// lists, or spans of rows. `tiles` is int64 [B, Hkv, 2], the tiles of 64 keys that groups of 64
// rows visited and skipped, or [B, Hkv, 0] without thresholds.
#define SPARSE_FMHA_DECODE_OPTIONS                                                   \
  " Tensor? page_table=None, Tensor? block_indices=None, Tensor? block_counts=None," \
  " int block=64, Tensor? token_indices=None, Tensor? token_counts=None,"            \
  " Tensor? head_starts=None, Tensor? head_lengths=None, Tensor? tree_mask=None,"    \
  " bool causal=True, SymInt? window=None, float? scale=None, Tensor? sink=None,"    \
  " Tensor? skip_threshold=None, SymInt? split_tokens=None,"                         \
  " float softcap=0.0)"
SPARSE_FMHA_OP(
    decode, "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens," SPARSE_FMHA_DECODE_OPTIONS
            " -> (Tensor out, Tensor lse, Tensor tiles)")
// The same into the caller's `out`.
SPARSE_FMHA_OP(decode_out,
               "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,"
               " Tensor(a!) out," SPARSE_FMHA_DECODE_OPTIONS " -> (Tensor lse, Tensor tiles)")

}  // namespace sparse_fmha
