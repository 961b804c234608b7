// Which of two decode kernels is faster for some lengths. Integer arithmetic for host and device,
// so that the kernels, which are both launched, and the host's explanation agree.
#pragma once

#include "sparse_fmha/planning/decode_parts.h"

namespace sparse_fmha {

// The slots of the lists of a call: of requests, or of their KV heads where these differ.
struct SlotTotals {
  int64_t sum = 0;
  int32_t longest = 0;
  int32_t count = 0;

  SPARSE_FMHA_HD void add(int32_t slots) {
    sum += slots;
    longest = max_int(longest, slots);
    ++count;
  }

  // Whether the kernel for few rows is the faster one, if `blocks` share the keys of a group and
  // all groups run at a time. It ends with its longest group, the other kernel with all keys.
  // Measured on an H200: with lengths alike it takes 3 to 6% less, and at least 10 us; a block
  // whose neighbors have ended reads a key in 8 ns. So it may read 1/32 of the mean more than the
  // mean, or 1024 keys.
  SPARSE_FMHA_HD bool alike(int32_t blocks) const {
    constexpr int64_t kShare = 32;
    constexpr int64_t kKeys = 1024;                        // of a block
    int64_t const above = int64_t{longest} * count - sum;  // the mean, `count` times
    return above * kShare <= sum || above <= kKeys * blocks * count;
  }
};

// Whether KV heads of a request may have different slots.
SPARSE_FMHA_HD bool slots_by_head(DecodeKeys const& keys) {
  return keys.lengths.head_stride != 0 || keys.starts.data != nullptr ||
         (keys.counts.data != nullptr && keys.counts.head_stride != 0);
}

}  // namespace sparse_fmha
