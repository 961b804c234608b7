#include "packed.h"

#include <algorithm>

#include "check.h"
#include "list_arguments.h"
#include "run.h"
#include "sparse_fmha/cpu/dispatch.h"

namespace sparse_fmha {
namespace {

// Starts of sequences [B + 1] in order, within the tokens.
std::vector<int32_t> starts_of(char const* name, Tensor const& cu, int64_t size, int64_t tokens,
                               Tensor const& q) {
  check_list(name, cu, ScalarType::Int, {size}, q);
  require(cu.size(0) > 0, name, " must have shape [sequences + 1], got [0]");
  auto const* const given = static_cast<int32_t const*>(cu.data_ptr());
  std::vector<int32_t> starts(given, given + cu.size(0));
  int32_t last = 0;
  for (int32_t& start : starts) {
    last = static_cast<int32_t>(std::clamp<int64_t>(start, last, tokens));
    start = last;
  }
  return starts;
}

void check_bound(char const* name, int64_t bound, char const* what, int32_t index, int32_t length) {
  require(length <= bound, name, " must be at least the ", length, " ", what, " of sequence ",
          index, ", got ", bound);
}

int64_t tokens_of(char const* name, Tensor const& t) {
  require(t.size(0) <= INT32_MAX, name, " must have at most 2^31 - 1 tokens, got ", t.size(0));
  return t.size(0);
}

}  // namespace

void check_packing(Packing const& packing) {
  require(packing.max_q >= 0, "max_q must be at least 0, got ", packing.max_q);
  require(packing.max_k >= 0, "max_k must be at least 0, got ", packing.max_k);
  require(packing.cu_k || (packing.page_table && packing.seqused_k),
          "cu_k must be given unless seqused_k and page_table are, got None");
}

std::vector<PackedSequence> sequences_of(Packing const& packing, Tensor const& q, Tensor const& k) {
  check_packing(packing);
  bool const paged = packing.page_table.has_value();
  std::vector<int32_t> const q_starts = starts_of("cu_q", packing.cu_q, -1, tokens_of("q", q), q);
  int64_t const batch = static_cast<int64_t>(q_starts.size()) - 1;
  int64_t const most = paged ? INT32_MAX : tokens_of("k", k);
  std::vector<int32_t> k_starts(batch + 1, 0);
  if (packing.cu_k) {
    k_starts = starts_of("cu_k", *packing.cu_k, batch + 1, most, q);
  }
  int32_t const* used = nullptr;
  if (packing.seqused_k) {
    check_list("seqused_k", *packing.seqused_k, ScalarType::Int, {batch}, q);
    used = static_cast<int32_t const*>(packing.seqused_k->data_ptr());
  }
  int64_t capacity = most;  // keys of a sequence
  if (paged) {
    check_list("page_table", *packing.page_table, ScalarType::Int, {batch, -1}, q);
    capacity = std::min<int64_t>(INT32_MAX, packing.page_table->size(1) * k.size(1));
  }
  std::vector<PackedSequence> sequences;
  for (int32_t b = 0; b < batch; ++b) {
    int32_t const q_len = q_starts[b + 1] - q_starts[b];
    int64_t k_len = k_starts[b + 1] - k_starts[b];
    if (used != nullptr) {
      k_len = paged ? used[b] : std::min<int64_t>(k_len, used[b]);
    }
    k_len = std::clamp<int64_t>(k_len, 0, capacity);
    check_bound("max_q", packing.max_q, "queries", b, q_len);
    check_bound("max_k", packing.max_k, "keys", b, static_cast<int32_t>(k_len));
    if (q_len > 0 && k_len > 0) {
      int32_t const k_begin = paged ? 0 : k_starts[b];
      sequences.push_back({b, q_starts[b], q_len, k_begin, static_cast<int32_t>(k_len)});
    }
  }
  return sequences;
}

FmhaProblem packed_problem(Tensor& q, Tensor& k, Tensor& v, bool paged,
                           std::optional<double> scale) {
  FmhaProblem p;
  p.dtype = check_operand("q", q, 3);
  check_operand("k", k, paged ? 4 : 3);
  check_operand("v", v, paged ? 4 : 3);
  check_like_q("k", k, q);
  check_like_q("v", v, q);
  require(same_shape(k, v), "v must have k's shape, ", shape_of(k), ", got ", shape_of(v));
  int64_t const dim = q.size(2);
  int64_t const heads = k.dim() - 2;
  require(k.size(heads + 1) == dim, "k must have q's head dim, ", dim, ", got ", k.size(heads + 1));
  int64_t const heads_q = q.size(1);
  int64_t const heads_kv = k.size(heads);
  check_groups(heads_q, heads_kv);
  require(heads_q <= INT32_MAX, "heads of q must be at most 2^31 - 1, got ", heads_q);
  p.scale = scale_of(scale, dim);
  p.batch = 1;
  p.heads_q = static_cast<int32_t>(heads_q);
  p.heads_kv = static_cast<int32_t>(heads_kv);
  p.head_dim = p.value_dim = static_cast<int32_t>(dim);
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  return p;
}

// The tokens are the first dimension of a packed tensor, where others have the batch.
TensorView from_token(TensorView view, int64_t token, int64_t element_size) {
  if (view.data != nullptr) {
    view.data = static_cast<char*>(view.data) + token * view.batch_stride * element_size;
  }
  view.axis_stride[kGridAxes - 1] = view.batch_stride;
  view.batch_stride = 0;
  return view;
}

void for_each_sequence(
    std::vector<PackedSequence> const& sequences,
    std::function<void(PackedSequence const&, ExecutionContext const&)> const& body) {
  auto cost = [](PackedSequence const& s) { return static_cast<double>(s.q_len) * s.k_len; };
  std::vector<PackedSequence> heavy_first = sequences;
  std::stable_sort(
      heavy_first.begin(), heavy_first.end(),
      [&](PackedSequence const& a, PackedSequence const& b) { return cost(a) > cost(b); });
  double total = 0;
  for (PackedSequence const& s : heavy_first) {
    total += cost(s);
  }
  ExecutionContext all;
  all.parallel = &torch_threads();
  double const share = total / (2.0 * all.parallel->num_threads());
  size_t next = 0;
  for (; next < heavy_first.size() && cost(heavy_first[next]) > share; ++next) {
    body(heavy_first[next], all);
  }
  int64_t const rest = static_cast<int64_t>(heavy_first.size() - next);
  if (rest > 0) {
    cpu::share(all, rest, 0, [&](int64_t i, void*) {
      body(heavy_first[next + static_cast<size_t>(i)], ExecutionContext{});
    });
  }
}

}  // namespace sparse_fmha
