// Rows of the lists of a part whose keys are copied (gathered_keys.h), for its kernels.
#pragma once

#include "sparse_fmha/planning/gathered_keys.h"

namespace sparse_fmha::device {

struct ListRows {
  int64_t batch_stride;
  int64_t head_stride;
  int32_t groups;
  int32_t copies;  // of a key head
  int32_t first_batch;
  int32_t first_query_head;

  // `head`: of queries in the part; or of copies, which differ only if all share a list. Its stride
  // is then 0.
  SPARSE_FMHA_HD int64_t first(int32_t batch, int32_t head) const {
    return (first_batch + batch) * batch_stride + (first_query_head + head) * head_stride;
  }
};

inline ListRows list_rows(FmhaProblem const& p, GatheredPart const& part) {
  auto const& stripe = std::get<Stripe::Params>(p.sparsity);
  return {stripe.batch_stride, stripe.head_stride, ceil_div(stripe.len_q, stripe.block_q),
          copies_of_head(p),   part.first_batch,   part.first_head * (p.heads_q / p.heads_kv)};
}

// At a batch entry and a head, of 16-bit elements.
inline TensorView view_at(TensorView view, int64_t batch, int64_t head) {
  if (view.data != nullptr) {
    view.data =
        static_cast<uint16_t*>(view.data) + batch * view.batch_stride + head * view.head_stride;
  }
  return view;
}

}  // namespace sparse_fmha::device
