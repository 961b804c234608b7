// The blocks that may be among the largest of a token, in shared memory. A token is a
// warp's own. Blocks come in order, so of equal ones the first are kept.
#pragma once

#include "sparse_fmha/core/config.h"
#include "sparse_fmha/device/mma_tile.h"

namespace sparse_fmha::device {

struct SsaCandidate {
  float weight;  // not negative, so its bits are in the order of the weights
  int32_t block;
};

// Of a token, in shared memory: how many there are, the weight that others must exceed, and the
// blocks to choose from.
struct alignas(16) SsaKept {
  int32_t count;
  float least;
  int32_t before;
};

// Keeps the n largest of `count` >= n candidates, in order, and returns the least weight of them.
// Called by whole warps.
__device__ __forceinline__ float keep_largest(SsaCandidate* candidates, int32_t count, int32_t n) {
  int32_t const lane = threadIdx.x % 32;
  uint32_t const lanes_before = (1u << lane) - 1;
  __syncwarp();      // all have been written
  uint32_t cut = 0;  // the bits of the n-th largest
#pragma unroll 1
  for (int bit = 30; bit >= 0; --bit) {
    uint32_t const trial = cut | 1u << bit;
    int32_t reach = 0;
    for (int32_t first = 0; first < count; first += 32) {
      bool const there = first + lane < count;
      uint32_t const order = there ? __float_as_uint(candidates[first + lane].weight) : 0;
      reach += __popc(__ballot_sync(kWholeWarp, order >= trial));
    }
    cut = reach >= n ? trial : cut;
  }
  int32_t ties = n;  // those equal to the cut that are kept
  for (int32_t first = 0; first < count; first += 32) {
    bool const there = first + lane < count;
    uint32_t const order = there ? __float_as_uint(candidates[first + lane].weight) : 0;
    ties -= __popc(__ballot_sync(kWholeWarp, order > cut));
  }
  int32_t kept = 0;
  for (int32_t first = 0; first < count; first += 32) {
    bool const there = first + lane < count;
    SsaCandidate const one = there ? candidates[first + lane] : SsaCandidate{0, -1};
    uint32_t const order = __float_as_uint(one.weight);
    uint32_t const equal = __ballot_sync(kWholeWarp, there && order == cut);
    bool const keep =
        there && (order > cut || (order == cut && __popc(equal & lanes_before) < ties));
    uint32_t const kept_lanes = __ballot_sync(kWholeWarp, keep);  // and all have read
    if (keep) {
      candidates[kept + __popc(kept_lanes & lanes_before)] = one;
    }
    __syncwarp();
    kept += __popc(kept_lanes);
    ties = max_int(0, ties - __popc(equal));
  }
  return __uint_as_float(cut);
}

// Adds block + i with lane i's weight to a token's candidates if it may be among the n largest.
// Lanes from kKeys on have none. `capacity` is at least n + 32.
template <int kKeys>
__device__ __forceinline__ void add_candidates(SsaCandidate* candidates, SsaKept& kept,
                                               float weight, int32_t block, int32_t n,
                                               int32_t capacity) {
  int32_t const lane = threadIdx.x % 32;
  SsaKept const now = kept;
  bool const exists = lane < kKeys && block + lane < now.before;
  // NaN does not exceed anything.
  uint32_t const better = __ballot_sync(kWholeWarp, exists && weight > now.least);
  if (better == 0) {
    return;
  }
  if (better >> lane & 1) {
    candidates[now.count + __popc(better & ((1u << lane) - 1))] = {weight, block + lane};
  }
  int32_t count = now.count + __popc(better);
  float least = now.least;
  if (count > capacity - 32) {
    least = keep_largest(candidates, count, n);
    count = n;
  }
  if (lane == 0) {
    kept.count = count;
    kept.least = least;
  }
}

}  // namespace sparse_fmha::device
