// The tile scheduler of persistent kernels.
#pragma once

#include <cstdint>

#include "sparse_fmha/planning/tile_turns.h"

namespace sparse_fmha::device {

struct WorkTile {
  int32_t q_tile;
  int32_t head;
  int32_t batch;  // negative: no work is left
};

// Hands out tiles from one counter or in turns, heaviest first: under a causal mask those with the
// highest queries. Heads are in groups whose keys and values fit in the L2 cache together; all
// heads of a group walk down their query tiles side by side.
struct Scheduler {
  int32_t* next;      // device memory, zero at launch: counts tiles taken after each thread block's
                      // first one; null if they take turns, as next_in_turns() has it
  int32_t num_tiles;  // q_tiles * heads * batch
  int32_t q_tiles;
  int32_t heads;
  int32_t instances;  // heads * batch
  int32_t group;      // instances per group

  __device__ __forceinline__ WorkTile decode(int32_t index) const {
    if (index >= num_tiles) {
      return {0, 0, -1};
    }
    int32_t const first = index / (group * q_tiles) * group;
    int32_t const rest = index - first * q_tiles;
    int32_t const width = min(group, instances - first);
    int32_t const instance = first + rest % width;
    return {q_tiles - 1 - rest / width, instance % heads, instance / heads};
  }
  // The tile after `index`, which this thread block has taken.
  __device__ __forceinline__ int32_t take(int32_t index) const {
    auto const blocks = static_cast<int32_t>(gridDim.x);
    return next == nullptr ? next_in_turns(index, blocks) : blocks + atomicAdd(next, 1);
  }
};

// The same where the number of query tiles, at most q_tiles, is known on the device alone.
struct CountedScheduler : Scheduler {
  int32_t const* count;

  __device__ __forceinline__ WorkTile decode(int32_t index) const {
    Scheduler known = *this;
    known.q_tiles = *count;
    known.num_tiles = known.q_tiles * instances;
    return known.decode(index);
  }
};

}  // namespace sparse_fmha::device
