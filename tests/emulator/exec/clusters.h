// Blocks of a cluster: their shared memory as each other's, and their barrier.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace emulator {

struct Block;
struct Warp;

// A store to another block's memory lands when the cluster's barrier completes that its thread
// arrives at next, so what does not wait for it reads what was there before.
struct Cluster {
  std::vector<Block*> blocks;  // by rank; nullptr: has ended
  uint32_t completed = 0;      // phases of the barrier
  std::vector<std::function<void()>> late;
};

// Completes the barrier's phase if all threads that have not ended have arrived.
void complete_if_arrived(Cluster& cluster);

}  // namespace emulator
