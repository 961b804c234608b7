// Parameters of the decode kernels.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/planning/decode_parts.h"

namespace sparse_fmha::sm90 {

struct DecodeParams {
  DecodeKeys keys;
  TensorView q, k, v, out;
  float* lse;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t groups;      // of rows, in all requests and KV heads
  int32_t row_groups;  // of one KV head
  int32_t rows;        // most rows of a group
  float scale_log2;    // |scale| * log2(e), never zero
  bool negate;         // the scale is negative
  // Filled in by the planning kernel:
  int64_t* first;   // [groups + 1]: the first unit of each group
  KeyRange* tiles;  // [groups]
  // The results of the pieces, by DecodeParts::place():
  float* partial;  // [.., rows, head_dim]: not normalised
  float2* sums;    // [.., rows]: reference in log2 units, and sum

  struct Group {
    int32_t batch, head, row_group;
  };
  SPARSE_FMHA_HD Group group(int32_t index) const {
    int32_t const head = index / row_groups;
    return {head / heads_kv, head % heads_kv, index % row_groups};
  }
  SPARSE_FMHA_HD int32_t unit_tiles() const {
    return keys.split > 0 ? keys.split / DecodeKeys::kTile : 1;
  }
  SPARSE_FMHA_HD DecodeParts parts(int32_t blocks) const {
    int64_t const units = first[groups];
    return {units, keys.split > 0 ? units : blocks};
  }
};

}  // namespace sparse_fmha::sm90
