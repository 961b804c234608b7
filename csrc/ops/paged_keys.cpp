#include "paged_keys.h"

#include <algorithm>
#include <cstring>

namespace sparse_fmha {

PagedKeys::PagedKeys(Tensor const& k, Tensor const& v, Tensor const& table,
                     PackedSequence const& sequence)
    : heads_(k.size(2)), head_dim_(k.size(3)) {
  int64_t const row_bytes = heads_ * head_dim_ * k.element_size();
  k_.reset(new char[sequence.k_len * row_bytes]);
  v_.reset(new char[sequence.k_len * row_bytes]);
  auto const* const pages =
      static_cast<int32_t const*>(table.data_ptr()) + sequence.index * table.size(1);
  int64_t const page_size = k.size(1);
  keys_.reserve(sequence.k_len);
  for (int64_t first = 0; first < sequence.k_len; first += page_size) {
    int64_t const page = pages[first / page_size];
    if (page < 0 || page >= k.size(0)) {
      continue;
    }
    int64_t const rows = std::min<int64_t>(page_size, sequence.k_len - first);
    copy_page(k, page, rows, k_.get() + first * row_bytes);
    copy_page(v, page, rows, v_.get() + first * row_bytes);
    for (int64_t row = 0; row < rows; ++row) {
      keys_.push_back(static_cast<int32_t>(first + row));
    }
  }
  count_ = static_cast<int32_t>(keys_.size());
}

void PagedKeys::copy_page(Tensor const& from, int64_t page, int64_t rows, char* to) const {
  int64_t const size = from.element_size();
  auto const* const data = static_cast<char const*>(from.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads_; ++head) {
      int64_t const offset = page * from.stride(0) + row * from.stride(1) + head * from.stride(2);
      std::memcpy(to, data + offset * size, head_dim_ * size);
      to += head_dim_ * size;
    }
  }
}

void PagedKeys::use_in(FmhaProblem& problem, bool causal) {
  problem.k = {k_.get(), 0, {0, 0, heads_ * head_dim_}, head_dim_};
  problem.v = {v_.get(), 0, {0, 0, heads_ * head_dim_}, head_dim_};
  int32_t const len_q = problem.grid_q[kGridAxes - 1];
  int32_t const len_kv = problem.grid_kv[kGridAxes - 1];
  if (count_ == len_kv) {
    return;
  }
  constexpr int32_t kRows = 64;  // the queries of a group are a multiple of it
  Stripe::Params params{};
  params.len_q = len_q;
  params.len_kv = len_kv;
  params.block_q = ceil_div(len_q, kRows) * kRows;  // one list for all queries
  params.range_size = kRows;
  params.causal = causal;
  params.columns = {&count_, keys_.data(), count_};
  problem.sparsity = params;
}

}  // namespace sparse_fmha
