// Decode attention of few rows (sm90/decode/few_rows/): which calls it serves, and how many thread
// blocks share the keys of a group. Integer arithmetic for the host.
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

  // Whether the calls of a kernel are for them. Lengths are not known: where a request may have
  // many more keys than another, parts of equal size are worth their plan.
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
  // A block reads up to three times as fast as when all are busy: this many keys are over before a
  // call with so large a cache.
  static constexpr int64_t kMostKeys = 16384;
  static constexpr int64_t kMostToShare = 2;

  static int64_t ceil_div_64(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t to_fill(int64_t groups) {
    return std::clamp<int64_t>(kBusy / std::max<int64_t>(groups, 1), 1, kMostBlocks);
  }
};

}  // namespace sparse_fmha
