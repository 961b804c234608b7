// The op of Quest's choice of pages (sparse_fmha/core/quest_pages.h).
#include "sparse_fmha/core/quest_pages.h"

#include <tuple>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"

namespace sparse_fmha {
namespace {

constexpr int64_t kMost = 1 << 30;

// int32 [B, n] with any strides.
IndexTable table_of(Tensor const& t, Tensor const& q) {
  require(t.scalar_type() == ScalarType::Int, "page_table must have dtype int32, got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.dim() == 2 && t.size(0) == q.size(0), "page_table must have shape [", q.size(0),
          ", any], got ", shape_of(t));
  check_memory("page_table", t, q);
  IndexTable table;
  table.data = static_cast<int32_t const*>(t.data_ptr());
  table.batch_stride = t.stride(0);
  table.stride = t.stride(1);
  table.width = int_from(0, kMost, "the width of page_table", t.size(1));
  return table;
}

// Checks q and the bounds, which may be replaced by copies, and describes them.
QuestPages pages_of(Tensor& q, Tensor& low, Tensor& high) {
  QuestPages p = {};
  p.q_dtype = check_operand("q", q, 3);
  p.dtype = check_operand("low", low, 3);
  require(check_operand("high", high, 3) == p.dtype && same_shape(low, high),
          "high must have the dtype and shape of low, ",
          torch::headeronly::toString(low.scalar_type()), ", ", shape_of(low), ", got ",
          torch::headeronly::toString(high.scalar_type()), ", ", shape_of(high));
  require(on_one_device(low, q) && on_one_device(high, q), "low and high must be on q's device, ",
          device_of(q), ", got ", device_of(low), " and ", device_of(high));
  require(on_cpu(q) || p.dtype != DataType::kFloat64,
          "low must have dtype float16, bfloat16 or float32 on CUDA, got Double");
  require(low.size(2) == q.size(2), "low must have q's head dim, ", q.size(2), ", got ",
          low.size(2));
  check_groups(q.size(1), low.size(1), "low");
  p.batch = int_from(0, kMost, "the batch of q", q.size(0));
  p.heads_q = int_from(0, kMost, "the heads of q", q.size(1));
  p.heads_kv = static_cast<int32_t>(low.size(1));
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.num_pages = int_from(0, kMost, "the pages of low", low.size(0));
  p.q = view(q);
  p.low = view(low);
  p.high = view(high);
  return p;
}

std::tuple<Tensor, Tensor> quest_pages(Tensor q, Tensor low, Tensor high, Tensor seq_lens,
                                       std::optional<Tensor> page_table, int64_t page,
                                       int64_t best) {
  QuestPages p = pages_of(q, low, high);
  p.page = int_from(1, kMost, "page", page);
  p.best = int_from(0, kMost, "best", best);
  check_list("seq_lens", seq_lens, ScalarType::Int, {p.batch}, q);
  p.lengths = static_cast<int32_t const*>(seq_lens.data_ptr());
  if (page_table) {
    p.table = table_of(*page_table, q);
    p.width = p.table.width;
  } else {
    require(p.batch == 0 || p.num_pages % p.batch == 0, "low must have a multiple of ", p.batch,
            " pages without a page_table, got ", p.num_pages);
    p.width = p.batch == 0 ? 0 : p.num_pages / p.batch;
  }
  Tensor indices = new_tensor(q, {p.batch, p.heads_kv, int64_t{p.best} + 1}, ScalarType::Int);
  Tensor counts = new_tensor(q, {p.batch, p.heads_kv}, ScalarType::Int);
  if (counts.numel() != 0) {
    Tensor scores = new_tensor(q, {p.batch, p.heads_kv, p.width}, ScalarType::Float);
    p.scores = static_cast<float*>(scores.data_ptr());
    p.indices = static_cast<int32_t*>(indices.data_ptr());
    p.counts = static_cast<int32_t*>(counts.data_ptr());
    DeviceScope const scope(q);
    Launch launch(q);
    choose_quest_pages(arch_of(q), p, launch.context());
  }
  return {indices, counts};
}

}  // namespace

SPARSE_FMHA_OP(quest_pages,
               "(Tensor q, Tensor low, Tensor high, Tensor seq_lens, Tensor? page_table, int page,"
               " int best) -> (Tensor indices, Tensor counts)")

}  // namespace sparse_fmha
