// Decode attention of few rows (sm90/decode/few_rows/): which calls it serves, and how many thread
// blocks share the keys of a group. Integer arithmetic for the host.
#pragma once

#include <algorithm>
#include <array>
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
  // By size: clusters of one of its kernels that run at once. Larger ones leave multiprocessors
  // idle that are not a whole cluster.
  using AtOnce = std::array<int32_t, kMostBlocks + 1>;

  static bool serves(DecodeKeys const& keys) {
    int32_t const rows = keys.by_query ? keys.group : keys.len_q * keys.group;
    return rows <= kRows && keys.split == 0 && keys.tree.data == nullptr &&
           decode_box(keys, DecodeKeys::kTile) > 0;
  }

  // Of each of `groups`, which have up to `slots` keys: as many as run at once. Lengths are not
  // known, so a block has at most kMostKeys: a request that is longer than all others is not left
  // to few multiprocessors.
  static int32_t blocks(int64_t groups, int64_t slots, AtOnce const& at_once) {
    constexpr int64_t kFewestKeys = 128;
    constexpr int64_t kMostKeys = 16384;
    auto const of = [&](int64_t keys) {
      return static_cast<int32_t>(std::clamp<int64_t>((slots + keys - 1) / keys, 1, kMostBlocks));
    };
    int32_t blocks = of(kFewestKeys);
    while (blocks > of(kMostKeys) && groups > at_once[blocks]) {
      --blocks;
    }
    return blocks;
  }
};

}  // namespace sparse_fmha
