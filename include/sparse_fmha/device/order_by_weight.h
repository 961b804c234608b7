// Orders tiles by weight, heaviest first.
#pragma once

#include <cstdint>

#include "sparse_fmha/core/config.h"

namespace sparse_fmha::device {

inline constexpr int kOrderWarps = 32;
inline constexpr int kOrderThreads = kOrderWarps * 32;

// Thread blocks of kOrderThreads needed to order `tiles` tiles of one list: each takes 32
// neighboring tiles.
SPARSE_FMHA_HD int32_t order_groups(int32_t tiles) { return ceil_div(tiles, kOrderWarps); }

// The position of a tile is the number of tiles of its list that come before it, counted by a warp.
// Tiles of equal weight keep their order, so that neighbors share keys; as everywhere, the last
// ones come first. weight(tile) and put(position, tile) are those of the block's list.
template <class Weight, class Put>
__device__ __forceinline__ void order_by_weight(int32_t tiles, Weight const& weight,
                                                Put const& put) {
  __shared__ int32_t weights[kOrderThreads];
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  int32_t const group = static_cast<int32_t>(blockIdx.x % order_groups(tiles));
  int32_t const mine = group * kOrderWarps + thread / 32;
  int32_t const my_weight = mine < tiles ? weight(mine) : 0;
  int32_t before = 0;
  for (int32_t first = 0; first < tiles; first += kOrderThreads) {
    int32_t const count = min(kOrderThreads, tiles - first);
    __syncthreads();  // the last weights have been read
    if (thread < count) {
      weights[thread] = weight(first + thread);
    }
    __syncthreads();
    for (int32_t i = thread % 32; i < count; i += 32) {
      before += weights[i] > my_weight || (weights[i] == my_weight && first + i > mine);
    }
  }
  before = __reduce_add_sync(0xffffffff, before);
  if (thread % 32 == 0 && mine < tiles) {
    put(before, mine);
  }
}

}  // namespace sparse_fmha::device
