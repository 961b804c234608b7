// Parameters of the decode kernels of all families.
#pragma once

#include <vector_types.h>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/planning/decode_parts.h"

namespace sparse_fmha::device {

// The keys of the groups.
struct DecodePlan {
  int32_t* first;   // [groups + 1]: the first unit of each
  KeyRange* tiles;  // [groups]
};

struct DecodeParams {
  DecodeKeys keys;
  TensorView q, k, v, out;
  float* lse;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t groups;      // of rows, in all requests and KV heads
  int32_t row_groups;  // of one KV head
  int32_t rows;        // most rows of a group
  int32_t box;         // keys of a copy, a power of two; 0: keys are gathered one by one
  float scale_log2;    // makes scores those of the softmax in log2 units; never zero
  float tanh_scale;  // of capped scores, before: they are replaced by tanh(tanh_scale * q.k); or 0
  bool negate;       // the scale is negative
  bool fits_cache;   // what may be read is at most about twice the L2 cache
  bool planned;      // decode_plan_kernel fills in the plan; else the first block does
  DecodePlan plan;
  int32_t* next;  // counts the parts that were taken after the first of each worker; or nullptr
  // Of each group, or of each part if there are fewer: a group with several pieces, or -1, and its
  // first and last part. A part stands for the group that begins in it and goes on.
  int4* merges;
  int32_t most_merges;
  bool merges_by_group;
  // The results of the pieces that are merged, by DecodeParts::place():
  float* partial;   // [.., rows, head_dim]: not normalised
  float2* sums;     // [.., rows]: reference in log2 units, and sum
  SkipParams skip;  // of KV heads; last: kernels without votes do not read it

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
  // The units of all groups, cut for a number of workers.
  SPARSE_FMHA_HD DecodeParts parts(int32_t units, int32_t workers) const {
    return keys.split > 0 ? DecodeParts(units)
                          : DecodeParts(units, workers, DecodeParts::short_parts(rows));
  }
};

}  // namespace sparse_fmha::device
