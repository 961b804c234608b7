// Parameters of the decode kernels.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/planning/decode_parts.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// The keys of the groups.
struct DecodePlan {
  int32_t* first;   // [groups + 1]: the first unit of each
  KeyRange* tiles;  // [groups]
};

struct DecodeParams {
  CUtensorMap k_map, v_map;  // boxes of `box` keys, if box > 0
  DecodeKeys keys;
  TensorView q, k, v, out;
  float* lse;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t groups;      // of rows, in all requests and KV heads
  int32_t row_groups;  // of one KV head
  int32_t rows;        // most rows of a group
  int32_t box;         // keys of a copy, a power of two; 0: keys are gathered one by one
  float scale_log2;    // |scale| * log2(e), never zero
  bool negate;         // the scale is negative
  bool fits_cache;     // what may be read is at most about twice the L2 cache
  bool planned;        // decode_plan_kernel fills in the plan; else each block does
  // Thread blocks of a cluster, which has one group and merges its pieces in shared memory; 0: all
  // blocks share all groups, and a second kernel merges their pieces.
  int32_t cluster;
  // KV heads of a request that are cut alike, so that they read the same tokens at the same time:
  // all of them, if their tiles are the same, or 1.
  int32_t lines;
  DecodePlan plan;
  int32_t* next;  // counts the parts that were taken after the first of each worker; or nullptr
  // Of each group, or of each part if there are fewer: a group with several pieces, or -1, and its
  // first and last part. A part stands for the group that begins in it and goes on. Groups are
  // counted as parts are: those of lines alternate.
  int4* merges;
  int32_t most_merges;
  bool merges_by_group;
  // The results of the pieces that are merged, by DecodePiece::place():
  float* partial;   // [.., rows, head_dim]: not normalised
  float2* sums;     // [.., rows]: reference in log2 units, and sum
  SkipParams skip;  // of KV heads; last: kernels without votes do not read it

  struct Group {
    int32_t batch, head, row_group;
  };
  // The group of a line; there are groups / lines in each.
  SPARSE_FMHA_HD Group group(int32_t index, int32_t line) const {
    int32_t const outer = index / row_groups;
    int32_t const row_group = index % row_groups;
    return lines > 1 ? Group{outer, line, row_group}
                     : Group{outer / heads_kv, outer % heads_kv, row_group};
  }
  SPARSE_FMHA_HD int32_t unit_tiles() const {
    return keys.split > 0 ? keys.split / DecodeKeys::kTile : 1;
  }
  // The units of a line, cut for a team's workers.
  SPARSE_FMHA_HD DecodeParts parts(int32_t units, int32_t team_workers) const {
    int32_t const workers = max_int(1, team_workers / lines);
    return keys.split > 0 ? DecodeParts(units)
           : cluster > 0  ? DecodeParts::equal(units, workers)
                          : DecodeParts(units, workers, DecodeParts::short_parts(rows));
  }
};

}  // namespace sparse_fmha::sm90
