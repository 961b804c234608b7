// Block lists in buffers from Python: one batch entry, one head.
#pragma once

#include <pybind11/pybind11.h>

#include "sparse_fmha/mechanisms/block_sparse.h"

namespace sparse_fmha {

// Keeps the buffers for as long as parameters point to them.
class ListBuffers {
 public:
  ListBuffers(pybind11::buffer const& counts, pybind11::buffer const& indices, int32_t width,
              pybind11::buffer const& partial_counts, pybind11::buffer const& partial_indices,
              pybind11::buffer const& bits, int32_t partial_width)
      : counts_(counts.request()),
        indices_(indices.request()),
        width_(width),
        partial_counts_(partial_counts.request()),
        partial_indices_(partial_indices.request()),
        bits_(bits.request()),
        partial_width_(partial_width) {}

  BlockSparse::Params params(int32_t len_q, int32_t len_kv, int32_t block_q, int32_t block_kv,
                             bool causal) const {
    auto ints = [](pybind11::buffer_info const& buffer) {
      return static_cast<int32_t const*>(buffer.ptr);
    };
    return {len_q,
            len_kv,
            block_q,
            block_kv,
            causal,
            {ints(counts_), ints(indices_), width_},
            {partial_width_ > 0 ? ints(partial_counts_) : nullptr, ints(partial_indices_),
             partial_width_},
            static_cast<uint8_t const*>(bits_.ptr),
            0,
            0};
  }

 private:
  pybind11::buffer_info counts_, indices_;
  int32_t width_;
  pybind11::buffer_info partial_counts_, partial_indices_, bits_;
  int32_t partial_width_;
};

}  // namespace sparse_fmha
