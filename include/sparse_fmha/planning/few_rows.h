// Decode attention of few rows (sm90/decode/few_rows/): which calls it serves, and how many thread
// blocks share the keys of a group. Integer arithmetic for the host.
#pragma once

#include <algorithm>

#include "sparse_fmha/planning/alike_lengths.h"
#include "sparse_fmha/planning/decode_sizes.h"

namespace sparse_fmha {

struct FewRows {
  static constexpr int32_t kRows = 16;       // of a group
  static constexpr int32_t kMostBlocks = 8;  // of a cluster

  // kByLengths: both kernels are launched, and one of them leaves at once.
  enum class Use { kNever, kAlways, kByLengths };

  // The host does not know lengths. Where one request may have many more keys than another, the
  // kernel that cuts all keys in equal parts may be the faster one.
  static Use use(DecodeKeys const& keys, int64_t batch, int64_t heads_kv, int32_t multiprocessors) {
    int64_t const groups = batch * heads_kv * keys.row_groups();
    if (!fits(keys, batch, heads_kv)) {
      return Use::kNever;
    }
    if (!may_be_long(groups, most_slots(keys))) {
      return Use::kAlways;
    }
    // All groups run at a time, and keep memory busy. With more, alike lengths would gain 0.4%.
    int64_t const at_a_time = groups * blocks(groups, most_slots(keys));
    if (at_a_time < kBusy || at_a_time > multiprocessors) {
      return Use::kNever;
    }
    return batch == 1 && !slots_by_head(keys) ? Use::kAlways : Use::kByLengths;
  }

  // The blocks of a cluster, which share a group of up to `slots` keys.
  static int32_t blocks(int64_t groups, int64_t slots) {
    if (may_be_long(groups, slots)) {  // but lengths are alike
      return static_cast<int32_t>(
          std::min<int64_t>(ceil_div_64(kBusy, std::max<int64_t>(groups, 1)), kMostBlocks));
    }
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

  static bool fits(DecodeKeys const& keys, int64_t batch, int64_t heads_kv) {
    int32_t const rows = keys.by_query ? keys.group : keys.len_q * keys.group;
    constexpr int64_t kMostInGrid = 65535;  // in its second and third dimension
    return batch <= kMostInGrid && heads_kv * keys.row_groups() <= kMostInGrid && rows <= kRows &&
           keys.split == 0 && keys.tree.data == nullptr && decode_box(keys, DecodeKeys::kTile) > 0;
  }
  static bool may_be_long(int64_t groups, int64_t slots) {
    return ceil_div_64(slots, kMostKeys) > std::max(to_fill(groups), kMostToShare);
  }
  static int64_t to_fill(int64_t groups) {
    return std::clamp<int64_t>(kBusy / std::max<int64_t>(groups, 1), 1, kMostBlocks);
  }
};

}  // namespace sparse_fmha
