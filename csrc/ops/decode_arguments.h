// The keys of decode attention as arguments of its op.
#pragma once

#include <optional>

#include "problem.h"
#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {

struct DecodeArguments {
  Tensor const& seq_lens;
  std::optional<Tensor> const& page_table;
  std::optional<Tensor> const& block_indices;
  std::optional<Tensor> const& block_counts;
  int64_t block;
  std::optional<Tensor> const& token_indices;
  std::optional<Tensor> const& token_counts;
  std::optional<Tensor> const& head_starts;
  std::optional<Tensor> const& head_lengths;
  std::optional<Tensor> const& tree_mask;
  bool causal;
  std::optional<int64_t> window;
  std::optional<Tensor> const& sink;
  std::optional<int64_t> split_tokens;
};

// Checks and describes them; the values of the tensors are not read. The result points into the
// tensors.
DecodeKeys decode_keys(DecodeArguments const& a, FmhaProblem const& problem, Tensor const& q,
                       Tensor const& k_cache);

}  // namespace sparse_fmha
