// The op of dense and causal attention over packed sequences.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "backward.h"
#include "check.h"
#include "list_arguments.h"
#include "packed.h"
#include "packed_on_gpu.h"
#include "paged_keys.h"
#include "placement.h"
#include "run.h"
#include "score_arguments.h"

namespace sparse_fmha {
namespace {

constexpr int64_t kRowTerms = 4;  // fp32 numbers of a query in Gradients::row_terms

// The problem of one sequence.
FmhaProblem of_sequence(FmhaProblem const& packed, PackedSequence const& s, bool causal,
                        int64_t element_size) {
  FmhaProblem problem = packed;
  problem.grid_q = {1, 1, s.q_len};
  problem.grid_kv = {1, 1, s.k_len};
  if (causal) {
    problem.sparsity = Causal::Params{s.q_len, s.k_len};
  } else {
    problem.sparsity = Dense::Params{s.q_len, s.k_len};
  }
  problem.q = from_token(packed.q, s.q_begin, element_size);
  problem.k = from_token(packed.k, s.k_begin, element_size);
  problem.v = from_token(packed.v, s.k_begin, element_size);
  problem.out = from_token(packed.out, s.q_begin, element_size);
  problem.lse = packed.lse + int64_t{s.q_begin} * packed.heads_q;
  return problem;
}

float const* thresholds_of(Tensor const& threshold, int64_t batch, Tensor const& q) {
  check_list("skip_threshold", threshold, ScalarType::Float, {batch}, q);
  return static_cast<float const*>(threshold.data_ptr());
}

std::vector<Tensor> varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_q,
                               std::optional<Tensor> cu_k, int64_t max_q, int64_t max_k,
                               bool causal, std::optional<double> scale,
                               std::optional<Tensor> seqused_k, std::optional<Tensor> page_table,
                               std::optional<Tensor> skip_threshold, double softcap) {
  if (on_gpu(q)) {
    require_no_options(skip_threshold, softcap);
    return packed_on_gpu({cu_q, cu_k, max_q, max_k, seqused_k, page_table}, q, k, v, causal, scale);
  }
  FmhaProblem packed = packed_problem(q, k, v, page_table.has_value(), scale);
  add_softcap(packed, softcap);
  std::vector<PackedSequence> const sequences =
      sequences_of({cu_q, cu_k, max_q, max_k, seqused_k, page_table}, q, k);
  int64_t const batch = cu_q.size(0) - 1;
  float const* const thresholds =
      skip_threshold ? thresholds_of(*skip_threshold, batch, q) : nullptr;
  Tensor out = new_tensor(q, sizes_of(q), q.scalar_type());
  Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  torch::stable::fill_(out, 0.0);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  std::vector<Tensor> results = {out, lse};
  int64_t* counts = nullptr;
  if (skip_threshold) {
    Tensor tiles = new_tensor(q, {batch, q.size(1), 2}, ScalarType::Long);
    torch::stable::fill_(tiles, 0.0);
    counts = static_cast<int64_t*>(tiles.data_ptr());
    results.push_back(tiles);
  }
  packed.out = view(out);
  packed.lse = static_cast<float*>(lse.data_ptr());
  for_each_sequence(sequences, [&](PackedSequence const& s, ExecutionContext const& context) {
    FmhaProblem problem = of_sequence(packed, s, causal, q.element_size());
    if (thresholds != nullptr) {
      problem.skip_threshold = thresholds + s.index;
      problem.skip_counts = counts + int64_t{s.index} * packed.heads_q * 2;
    }
    std::optional<PagedKeys> keys;
    if (page_table) {
      keys.emplace(k, v, *page_table, s).use_in(problem, causal);
    }
    kernel_for(problem, q, Pass::kForward).launch(problem, context);
  });
  return results;
}

std::vector<Tensor> varlen_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                               Tensor v, Tensor out, Tensor lse, Tensor cu_q,
                               std::optional<Tensor> cu_k, int64_t max_q, int64_t max_k,
                               bool causal, std::optional<double> scale,
                               std::optional<Tensor> seqused_k, std::optional<Tensor> page_table,
                               bool need_dq, bool need_dkv, double softcap) {
  require(!page_table,
          "page_table must be None, because keys in pages have no gradient, got a tensor");
  FmhaProblem packed = packed_problem(q, k, v, /*paged=*/false, scale);
  add_softcap(packed, softcap);
  std::vector<PackedSequence> const sequences =
      sequences_of({cu_q, cu_k, max_q, max_k, seqused_k, page_table}, q, k);
  packed.out = like_out("out", out, packed, q, /*contiguous=*/true);
  TensorView const gradient_of_out = like_out("dout", dout, packed, q, /*contiguous=*/false);
  // Kernels only read it in this pass.
  packed.lse = const_cast<float*>(rows_of_q("lse", lse, q));
  float const* const gradient_of_lse = dlse ? rows_of_q("dlse", *dlse, q) : nullptr;
  std::vector<Tensor> results = {new_gradient(q, need_dq), new_gradient(k, need_dkv),
                                 new_gradient(k, need_dkv)};
  for (Tensor& result : results) {
    torch::stable::fill_(result, 0.0);
  }
  if (!need_dq && !need_dkv) {
    return results;
  }
  int64_t const size = q.element_size();
  Tensor const row_terms = new_tensor(q, {q.size(0), q.size(1), kRowTerms}, ScalarType::Float);
  for_each_sequence(sequences, [&](PackedSequence const& s, ExecutionContext const& context) {
    FmhaProblem problem = of_sequence(packed, s, causal, size);
    Gradients gradients;
    gradients.out = from_token(gradient_of_out, s.q_begin, size);
    if (gradient_of_lse != nullptr) {
      gradients.lse = gradient_of_lse + int64_t{s.q_begin} * packed.heads_q;
    }
    problem.gradients = &gradients;
    gradients.row_terms =
        static_cast<float*>(row_terms.data_ptr()) + int64_t{s.q_begin} * packed.heads_q * kRowTerms;
    fill_row_terms(Arch::kCpu, problem, context);
    if (need_dq) {
      gradients.q = from_token(view(results[0]), s.q_begin, size);
      kernel_for(problem, q, Pass::kBackwardDq).launch(problem, context);
    }
    if (need_dkv) {
      gradients.k = from_token(view(results[1]), s.k_begin, size);
      gradients.v = from_token(view(results[2]), s.k_begin, size);
      kernel_for(problem, q, Pass::kBackwardDkv).launch(problem, context);
    }
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_fmha, m) {
  m.def(
      "varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor? cu_k, SymInt max_q,"
      " SymInt max_k, bool causal=False, float? scale=None, Tensor? seqused_k=None,"
      " Tensor? page_table=None, Tensor? skip_threshold=None, float softcap=0.0) -> Tensor[]");
  m.def(
      "varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " Tensor cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, bool causal=False,"
      " float? scale=None, Tensor? seqused_k=None, Tensor? page_table=None, bool need_dq=True,"
      " bool need_dkv=True, float softcap=0.0) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_fmha, CPU, m) {
  m.impl("varlen_fwd", TORCH_BOX(&varlen_fwd));
  m.impl("varlen_bwd", TORCH_BOX(&varlen_bwd));
}

// The backward pass on GPUs is over block lists (python/sparse_fmha/varlen).
STABLE_TORCH_LIBRARY_IMPL(sparse_fmha, CUDA, m) { m.impl("varlen_fwd", TORCH_BOX(&varlen_fwd)); }

}  // namespace sparse_fmha
