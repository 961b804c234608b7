// Quest's choice of pages (Tang et al. 2024, arXiv:2406.10774) as plain data.
// python/sparse_fmha/patterns/quest.py defines it.
#pragma once

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/decode.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

// For each request and key head the page of the newest token and, of the pages before it, the
// `best` ones with the largest upper bounds of a score, which are summed over the query heads of
// the key head. A row of the result has the newest page, then the others ascending, then -1.
struct QuestPages {
  DataType q_dtype;
  DataType dtype;  // of the bounds
  int32_t batch;
  int32_t heads_q;  // a multiple of heads_kv
  int32_t heads_kv;
  int32_t head_dim;
  int32_t num_pages;  // that have bounds
  int32_t width;      // pages that a request can have
  int32_t page;       // tokens of a page
  int32_t best;
  TensorView q;     // [B, heads_q, D]
  TensorView low;   // [num_pages, heads_kv, D]
  TensorView high;  // the same shape
  int32_t const* lengths;
  IndexTable table;  // of pages; data is nullptr without: page i of request b is b * width + i
  float* scores;     // [B, heads_kv, width], memory of the kernels
  int32_t* indices;  // [B, heads_kv, best + 1]
  int32_t* counts;   // [B, heads_kv]

  SPARSE_FMHA_HD int32_t group() const { return heads_q / heads_kv; }
  // Of a request: the page of its newest token, and so the number of those before it. -1 without
  // tokens.
  SPARSE_FMHA_HD int32_t newest(int32_t entry) const {
    int64_t const given = lengths[entry];
    int64_t const most = int64_t{width} * page;
    int64_t const length = given < 0 ? 0 : given < most ? given : most;
    return length == 0 ? -1 : static_cast<int32_t>((length - 1) / page);
  }
  // The bounds of a request's page; -1 if it has none.
  SPARSE_FMHA_HD int32_t place(int32_t entry, int32_t i) const {
    int64_t const at =
        table.data == nullptr ? int64_t{entry} * width + i : table.at(entry, 0, 0, i);
    return at >= 0 && at < num_pages ? static_cast<int32_t>(at) : -1;
  }
  // Of `low` or `high`.
  template <class Element>
  SPARSE_FMHA_HD static Element const* row(TensorView const& bounds, int64_t place, int64_t head) {
    return static_cast<Element const*>(bounds.data) + place * bounds.batch_stride +
           head * bounds.head_stride;
  }
  SPARSE_FMHA_HD int64_t query(int64_t entry, int64_t head) const {
    return entry * q.batch_stride + head * q.head_stride;
  }
  SPARSE_FMHA_HD int64_t list(int64_t entry, int64_t head_kv) const {
    return entry * heads_kv + head_kv;
  }
};

// Throws std::runtime_error if this build has no kernel for the architecture.
void choose_quest_pages(Arch arch, QuestPages const& pages, ExecutionContext const& context);

}  // namespace sparse_fmha
