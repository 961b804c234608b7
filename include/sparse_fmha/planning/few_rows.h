// Decode attention of few rows (sm90/decode/few_rows/): which calls it serves, and how many thread
// blocks share the keys of a group. Integer arithmetic for host and
// device.
#pragma once

#include <algorithm>
#include <numeric>

#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {

// The keys of a copy: slots from a multiple of this number on are consecutive rows of a cache. Zero
// if keys have to be gathered one by one.
inline int32_t decode_box(DecodeKeys const& keys, int32_t tile) {
  constexpr int32_t kSmallest = 16;  // smaller boxes are slower than single rows
  bool const spans = keys.starts.data != nullptr;
  if (keys.form == DecodeKeys::Form::kTokens || (spans && keys.page > 0)) {
    return 0;
  }
  int32_t box = tile;
  for (int32_t run : {keys.page, keys.form == DecodeKeys::Form::kBlocks ? keys.block : 0}) {
    box = std::gcd(box, run);
  }
  return box >= kSmallest ? box : 0;
}

// The slots that a request can have.
inline int64_t most_slots(DecodeKeys const& keys) {
  return keys.form == DecodeKeys::Form::kRange    ? keys.capacity
         : keys.form == DecodeKeys::Form::kBlocks ? int64_t{keys.entries.width} * keys.block
                                                  : keys.entries.width;
}

struct FewRows {
  static constexpr int32_t kRows = 16;       // of a group
  static constexpr int32_t kMostBlocks = 8;  // of a cluster
  // Blocks that keep memory busy. More streams at a time make memory slower.
  static constexpr int32_t kBusy = 64;
  static constexpr int32_t kFewestKeys = 128;  // that a block is worth
  static constexpr int64_t kMostKeys = 16384;  // of a block, if another request is shorter

  static bool serves(DecodeKeys const& keys) {
    int32_t const rows = keys.by_query ? keys.group : keys.len_q * keys.group;
    return rows <= kRows && keys.split == 0 && keys.tree.data == nullptr &&
           decode_box(keys, DecodeKeys::kTile) > 0;
  }

  // The blocks of a cluster: the most that may share a group. Lengths are not known, so that is
  // enough for one request that is longer than all others.
  static int32_t cluster(int64_t groups, int64_t slots) {
    int64_t const to_fill =
        std::min<int64_t>(kBusy / groups, (slots + kFewestKeys - 1) / kFewestKeys);
    int64_t const to_share = groups > 1 ? (slots + kMostKeys - 1) / kMostKeys : 1;
    return static_cast<int32_t>(std::clamp<int64_t>(std::max(to_fill, to_share), 1, kMostBlocks));
  }

  // How many of a cluster share a group of `slots` keys, where `of_all` are the keys of all
  // requests in one of `heads`.
  static SPARSE_FMHA_HD int32_t blocks_of(int32_t slots, int64_t of_all, int32_t heads,
                                          int32_t cluster) {
    int64_t const even = (of_all * heads + kBusy - 1) / kBusy;
    int64_t const share = even > kFewestKeys ? even : kFewestKeys;
    int64_t const blocks = (slots + share - 1) / share;
    return blocks < 1 ? 1 : blocks < cluster ? static_cast<int32_t>(blocks) : cluster;
  }
};

}  // namespace sparse_fmha
