// Sequences packed along one axis of tokens, and how threads share them.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha {

// One sequence: `q_len` queries from token `q_begin` of q, and `k_len` keys from token `k_begin` of
// k, or in the pages of row `index` of the page table (`k_begin` is 0 then).
struct PackedSequence {
  int32_t index;
  int32_t q_begin;
  int32_t q_len;
  int32_t k_begin;
  int32_t k_len;
};

// The arguments that say where sequences lie.
struct Packing {
  Tensor const& cu_q;                 // int32 [B + 1]
  std::optional<Tensor> const& cu_k;  // int32 [B + 1]
  int64_t max_q;                      // upper bounds of lengths
  int64_t max_k;
  std::optional<Tensor> const& seqused_k;   // int32 [B]
  std::optional<Tensor> const& page_table;  // int32 [B, pages of a sequence]; keys are in pages
};

// Throws if a bound is negative, or the lengths of the keys are not given.
void check_packing(Packing const& packing);

// Reads the sequences of q [Tq, Hq, D] and k, [Tk, Hkv, D] or [pages, page, Hkv, D], on the host.
// Starts are clamped to the tokens that exist, and a start below an earlier one counts as that one,
// so sequences do not overlap. Throws if a sequence is longer than max_q or max_k.
std::vector<PackedSequence> sequences_of(Packing const& packing, Tensor const& q, Tensor const& k);

// Describes q, k and v of all sequences: what they share, with addresses and strides of the packed
// tensors. Checks them.
FmhaProblem packed_problem(Tensor& q, Tensor& k, Tensor& v, bool paged,
                           std::optional<double> scale);

// A view of the tokens from `token` on.
TensorView from_token(TensorView view, int64_t token, int64_t element_size);

// Calls body(sequence, context) for each sequence with queries and keys. A sequence with a large
// part of the work runs on all threads; the others are shared among threads, one thread for each.
void for_each_sequence(
    std::vector<PackedSequence> const& sequences,
    std::function<void(PackedSequence const&, ExecutionContext const&)> const& body);

}  // namespace sparse_fmha
