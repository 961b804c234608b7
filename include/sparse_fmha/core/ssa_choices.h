// SSA's choice of key blocks (Shen et al. 2025, arXiv:2511.20102) as plain data.
// python/sparse_fmha/patterns/ssa.py defines it.
#pragma once

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

// For each token and key head the `few` blocks before the token's own with the largest weights,
// which are sums over the query heads of the key head: of the shares that blocks have in a softmax
// over those that end at the token or before. A row of the result has them ascending, then -1, and
// last the token's own block, -1 if it is before all keys.
struct SsaChoices {
  DataType dtype;
  int32_t batch;
  int32_t heads_q;  // a multiple of heads_kv
  int32_t heads_kv;
  int32_t head_dim;
  int32_t q_len;
  int32_t columns;   // blocks that have means
  int32_t parts;     // a mean is the sum of so many numbers
  TensorView q;      // [B, q_len, heads_q, D]
  TensorView means;  // [parts, B, columns, heads_kv, D]
  double scale;
  int32_t block;    // tokens of a block
  int32_t at;       // position of the first query
  int32_t few;      // blocks besides a token's own
  int32_t* chosen;  // [B, heads_kv, q_len, few + 1]

  SPARSE_FMHA_HD int32_t group() const { return heads_q / heads_kv; }
  // The block of a query, which may be past the last column.
  SPARSE_FMHA_HD int32_t own(int32_t token) const {
    return at + token < 0 ? -1 : (at + token) / block;
  }
  // Blocks of which it may choose.
  SPARSE_FMHA_HD int32_t before(int32_t token) const {
    return max_int(0, min_int(columns, own(token)));
  }
  // Blocks that end at it or before, over which its softmax is.
  SPARSE_FMHA_HD int32_t complete(int32_t token) const {
    return at + token < 0 ? 0 : min_int(columns, (at + token + 1) / block);
  }
  template <class Element>
  SPARSE_FMHA_HD Element const* query(int64_t entry, int64_t token, int64_t head) const {
    return static_cast<Element const*>(q.data) + entry * q.batch_stride +
           token * q.axis_stride[kGridAxes - 1] + head * q.head_stride;
  }
  template <class Element>
  SPARSE_FMHA_HD Element const* mean(int64_t part, int64_t entry, int64_t column,
                                     int64_t head_kv) const {
    return static_cast<Element const*>(means.data) + part * means.batch_stride +
           entry * means.axis_stride[kGridAxes - 2] + column * means.axis_stride[kGridAxes - 1] +
           head_kv * means.head_stride;
  }
  SPARSE_FMHA_HD int32_t* row(int64_t entry, int64_t head_kv, int64_t token) const {
    return chosen + ((entry * heads_kv + head_kv) * q_len + token) * (int64_t{few} + 1);
  }
};

// Throws std::runtime_error if this build has no kernel for the architecture.
void choose_ssa_blocks(Arch arch, SsaChoices const& choices, ExecutionContext const& context);

}  // namespace sparse_fmha
