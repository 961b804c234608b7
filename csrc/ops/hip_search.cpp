// The op of HiP's tree search (sparse_fmha/core/hip_search.h).
#include "sparse_fmha/core/hip_search.h"

#include <algorithm>
#include <tuple>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"
#include "sparse_fmha/device/hip_search.h"

namespace sparse_fmha {
namespace {

constexpr int64_t kMostRows = 2048;  // queries of a group
constexpr int64_t kMost = 1 << 30;   // keys of a batch entry, and keys of a result

// [B, 1 or Hkv, n] with any strides.
IndexTable table_of(Tensor const& t, HipSearch const& p, Tensor const& q) {
  require(t.scalar_type() == ScalarType::Int, "page_table must have dtype int32, got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.dim() == 3 && t.size(0) == p.batch && (t.size(1) == 1 || t.size(1) == p.heads_kv),
          "page_table must have shape [", p.batch, ", 1 or ", p.heads_kv, ", any], got ",
          shape_of(t));
  check_memory("page_table", t, q);
  require(t.size(2) <= kMost / std::max<int64_t>(1, p.page),
          "page_table must have pages for at most 2^30 keys, got shape ", shape_of(t),
          " and pages of ", p.page);
  IndexTable table;
  table.data = static_cast<int32_t const*>(t.data_ptr());
  table.batch_stride = t.stride(0);
  table.head_stride = t.size(1) == 1 ? 0 : t.stride(1);
  table.stride = t.stride(2);
  table.width = static_cast<int32_t>(t.size(2));
  return table;
}

// Checks q and k, which may be replaced by copies, and describes them.
HipSearch search_of(Tensor& q, Tensor& k, bool paged) {
  HipSearch p;
  p.dtype = check_operand("q", q, 4);
  check_like_q("k", k, q);
  check_operand("k", k, 4);
  require(on_cpu(q) || p.dtype != DataType::kFloat64,
          "q must have dtype float16, bfloat16 or float32 on CUDA, got Double");
  require(k.size(3) == q.size(3), "k must have q's head dim, ", q.size(3), ", got ", k.size(3));
  require(paged || k.size(0) == q.size(0), "k must have q's batch without a page_table, ",
          q.size(0), ", got ", k.size(0));
  check_groups(q.size(2), k.size(2), "k");
  for (int64_t d = 0; d < 3; ++d) {
    require(q.size(d) <= kMost && k.size(d) <= kMost,
            "q and k must have at most 2^30 entries in dimension ", d, ", got shapes ", shape_of(q),
            " and ", shape_of(k));
  }
  p.batch = static_cast<int32_t>(q.size(0));
  p.q_len = static_cast<int32_t>(q.size(1));
  p.heads_q = static_cast<int32_t>(q.size(2));
  p.heads_kv = static_cast<int32_t>(k.size(2));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.num_pages = static_cast<int32_t>(k.size(0));
  p.page = static_cast<int32_t>(k.size(1));
  p.q = view(q);
  p.k = view(k);
  return p;
}

std::tuple<Tensor, Tensor> hip_search(Tensor q, Tensor k, Tensor begin,
                                      std::optional<Tensor> page_table, int64_t block_q,
                                      int64_t sample, int64_t chunks, int64_t granule,
                                      int64_t first, int64_t halvings) {
  HipSearch p = search_of(q, k, page_table.has_value());
  p.block_q = int_from(1, kMostRows, "block_q", block_q);
  p.sample = int_from(1, kMost, "sample", sample);
  p.granule = int_from(1, kMost, "granule", granule);
  p.first = int_from(0, kMost, "first", first);
  p.halvings = int_from(0, 32, "halvings", halvings);
  p.chunks = int_from(1, kMost, "chunks", chunks);
  require(on_cpu(q) || chunks <= device::kMostHipChunks, "chunks must be at most ",
          device::kMostHipChunks, " on CUDA, got ", chunks);
  require(chunks * granule + first <= kMost, "chunks * granule + first must be at most 2^30, got ",
          chunks, " * ", granule, " + ", first);
  if (page_table) {
    p.table = table_of(*page_table, p, q);
  }
  check_list("begin", begin, ScalarType::Int, {-1, p.groups()}, q);
  p.begin = static_cast<int32_t const*>(begin.data_ptr());
  p.begin_stride = check_shared("begin", "batch", begin.size(0), p.batch) == 1 ? 0 : p.groups();

  Tensor columns = new_tensor(q, {p.batch, p.heads_q, p.groups(), p.width()}, ScalarType::Int);
  Tensor counts = new_tensor(q, {p.batch, p.heads_q, p.groups()}, ScalarType::Int);
  if (counts.numel() != 0) {
    p.columns = static_cast<int32_t*>(columns.data_ptr());
    p.counts = static_cast<int32_t*>(counts.data_ptr());
    DeviceScope const scope(q);
    Launch launch(q);
    find_hip_keys(arch_of(q), p, launch.context());
  }
  return {columns, counts};
}

}  // namespace

SPARSE_FMHA_OP(hip_search,
               "(Tensor q, Tensor k, Tensor begin, Tensor? page_table, int block_q, int sample,"
               " int chunks, int granule, int first, int halvings)"
               " -> (Tensor columns, Tensor counts)")

}  // namespace sparse_fmha
