#include "packed_on_gpu.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "run.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/core/packed.h"

namespace sparse_fmha {
namespace {

constexpr int64_t kMostTokens = 1 << 30;  // sm90/geometry/packed/ragged_box.h

int32_t const* int32_list(char const* name, Tensor const& t, std::vector<int64_t> const& sizes,
                          Tensor const& q) {
  check_list(name, t, ScalarType::Int, sizes, q);
  return static_cast<int32_t const*>(t.data_ptr());
}

// The keys that the pages of all sequences have room for.
int64_t room_of(PackedTokens const& packed) {
  return int64_t{packed.sequences} * packed.table.width * packed.table.page_size;
}

PackedTokens tokens_of(Packing const& packing, Tensor const& q, Tensor const& k) {
  check_packing(packing);
  PackedTokens packed;
  packed.cu_q = int32_list("cu_q", packing.cu_q, {-1}, q);
  int64_t const sequences = packing.cu_q.size(0) - 1;
  require(sequences >= 0, "cu_q must have shape [sequences + 1], got [0]");
  require(sequences < kMostTokens, "cu_q must have at most 2^30 sequences, got ", sequences);
  packed.sequences = static_cast<int32_t>(sequences);
  if (packing.cu_k) {
    packed.cu_k = int32_list("cu_k", *packing.cu_k, {sequences + 1}, q);
  }
  if (packing.seqused_k) {
    packed.used_k = int32_list("seqused_k", *packing.seqused_k, {sequences}, q);
  }
  if (packing.page_table) {
    Tensor const& table = *packing.page_table;
    packed.table.entries = int32_list("page_table", table, {sequences, -1}, q);
    int64_t const page = std::max<int64_t>(k.size(1), 1);
    int64_t const needed = (packing.max_k + page - 1) / page;
    packed.table.row_stride = table.size(1);
    packed.table.width = static_cast<int32_t>(std::min<int64_t>(needed, table.size(1)));
    packed.table.pages = static_cast<int32_t>(k.size(0));
    packed.table.page_size = static_cast<int32_t>(page);
    int64_t const keys = room_of(packed);
    require(keys <= std::numeric_limits<int32_t>::max(), "page_table must have at most 2^31 - 1 ",
            "keys within max_k, got ", keys);
  }
  return packed;
}

}  // namespace

void require_no_options(std::optional<Tensor> const& skip_threshold, double softcap) {
  char const* const given = skip_threshold ? "skip_threshold" : softcap != 0 ? "softcap" : nullptr;
  if (given != nullptr) {
    throw not_implemented(std::string("sparse_fmha: varlen_fwd with ") + given +
                          " runs on the CPU only; call sparse_fmha.varlen_attention, which takes "
                          "CUDA tensors over block lists");
  }
}

std::vector<Tensor> packed_on_gpu(Packing const& packing, Tensor& q, Tensor& k, Tensor& v,
                                  bool causal, std::optional<double> scale) {
  bool const paged = packing.page_table.has_value();
  FmhaProblem problem = packed_problem(q, k, v, paged, scale);
  require(q.size(0) <= kMostTokens, "q must have at most 2^30 tokens, got ", q.size(0));
  require(paged || k.size(0) <= kMostTokens, "k must have at most 2^30 tokens, got ", k.size(0));
  PackedTokens const packed = tokens_of(packing, q, k);
  int64_t const tokens_k = k.numel() == 0 ? 0 : paged ? room_of(packed) : k.size(0);
  problem.grid_q = {1, 1, static_cast<int32_t>(q.size(0))};
  problem.grid_kv = {1, 1, static_cast<int32_t>(tokens_k)};
  problem.q = from_token(problem.q, 0, q.element_size());
  if (!paged) {
    problem.k = from_token(problem.k, 0, k.element_size());
    problem.v = from_token(problem.v, 0, v.element_size());
  }
  problem.packed = &packed;
  if (causal) {
    problem.sparsity = Causal::Params{};
  } else {
    problem.sparsity = Dense::Params{};
  }
  KernelRow const& kernel = kernel_for(problem, q, Pass::kForward);
  DeviceScope const scope(q);
  Tensor out = new_tensor(q, sizes_of(q), q.scalar_type());
  Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  problem.out = from_token(view(out), 0, out.element_size());
  launch_into(kernel, problem, q, out, lse);
  return {out, lse};
}

}  // namespace sparse_fmha
