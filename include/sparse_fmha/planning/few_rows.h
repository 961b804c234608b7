// Decode attention of few rows (sm90/decode/few_rows/): which calls it serves, and how many thread
// blocks share the keys of a group. Integer arithmetic for the host.
#pragma once

#include <algorithm>

#include "sparse_fmha/planning/decode_sizes.h"

namespace sparse_fmha {

struct FewRows {
  static constexpr int32_t kRows = 16;       // of a group
  static constexpr int32_t kMostBlocks = 8;  // of a cluster

  // Whether a call takes the kernel. The host does not know lengths: where one request may have
  // many more keys than another, the kernel that cuts all keys in equal parts is faster.
  static bool serves(DecodeKeys const& keys, int64_t batch, int64_t heads_kv) {
    int32_t const rows = keys.by_query ? keys.group : keys.len_q * keys.group;
    constexpr int64_t kMostInGrid = 65535;  // in its second and third dimension
    bool const fits = batch <= kMostInGrid && heads_kv * keys.row_groups() <= kMostInGrid;
    return fits && rows <= kRows && keys.split == 0 && keys.tree.data == nullptr &&
           decode_box(keys, DecodeKeys::kTile) > 0 &&
           ceil_div_64(most_slots(keys), kMostKeys) <=
               std::max<int64_t>(to_fill(batch * heads_kv * keys.row_groups()), kMostToShare);
  }

  // The blocks of a cluster, which share a group of up to `slots` keys.
  static int32_t blocks(int64_t groups, int64_t slots) {
    int64_t const worth = std::min(to_fill(groups), ceil_div_64(slots, kFewestKeys));
    return static_cast<int32_t>(
        std::clamp<int64_t>(std::max(worth, ceil_div_64(slots, kMostKeys)), 1, kMostBlocks));
  }

 private:
  // Blocks that keep memory busy. More streams at a time make it slower.
  static constexpr int64_t kBusy = 64;
  static constexpr int64_t kFewestKeys = 128;  // that a block is worth
  // Of a block. It reads up to three times as fast as when all are busy, so the longest request of
  // a call does not take much longer than the others.
  static constexpr int64_t kMostKeys = 16384;
  static constexpr int64_t kMostToShare = 2;

  static int64_t to_fill(int64_t groups) {
    return std::clamp<int64_t>(kBusy / std::max<int64_t>(groups, 1), 1, kMostBlocks);
  }
};

}  // namespace sparse_fmha
