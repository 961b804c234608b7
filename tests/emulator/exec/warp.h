// The state of warps and thread blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../units/shared_memory.h"
#include "clusters.h"
#include "instruction.h"

namespace emulator {

struct Block;
struct Code;

// A copy of cp.async that has not landed.
struct ThreadCopy {
  uint8_t lane;
  uint32_t group;  // of the lane
  uint32_t to;     // a shared address
  std::byte const* from;
  uint32_t bytes;   // written
  uint32_t filled;  // of them, copied; the rest is zero
};

// Products of wgmma that have not been waited for, or bulk stores that have not read their source.
struct LateGroup {
  std::vector<std::function<void()>> work;
  std::vector<int32_t> registers;  // that the products write
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;  // in the block
  uint64_t* registers = nullptr;
  uint32_t live = 0;            // lanes that have not ended
  uint32_t waiting = 0;         // lanes that let others run first
  uint32_t parked = 0;          // lanes at a barrier, which moves them on when it is complete
  uint32_t parked_in_warp = 0;  // of them, those at bar.warp.sync
  int32_t pc[kLanes] = {};
  std::vector<std::byte> local;
  uint32_t turns = 0;  // that ended with the warp's lanes apart
  uint32_t polls = 0;  // how often a try_wait may still fail before it returns

  std::vector<ThreadCopy> copies;
  uint32_t copy_group[kLanes] = {};  // the open group of each lane

  // At the cluster's barrier: how often each lane has arrived, and has waited for that.
  uint32_t cluster_arrivals[kLanes] = {};
  uint32_t cluster_waits[kLanes] = {};

  LateGroup products;                // since the last wgmma.commit_group
  std::vector<LateGroup> committed;  // the oldest first
  std::vector<uint8_t> unfinished;   // per register, whether such a product will write it
  uint32_t unfinished_count = 0;
  std::vector<uint8_t> accessed;  // per register, whether it was used after the last wgmma.fence

  struct BulkStores {
    LateGroup open;
    std::vector<LateGroup> committed;
  };
  BulkStores bulk[kLanes];

  uint64_t* reg(int32_t index) { return registers + static_cast<int64_t>(index) * kLanes; }
};

// A barrier of bar.sync, for the phase under way.
struct NamedBarrier {
  struct Arrival {
    Warp* warp;
    uint32_t lanes;
    bool waits;  // bar.sync and bar.red; bar.arrive goes on
  };
  uint32_t arrived = 0;   // threads
  uint32_t expected = 0;  // threads; 0: all of the block
  std::vector<Arrival> arrivals;
};

// A copy that a barrier waits for, and that has not landed.
struct LateCopy {
  uint64_t due;             // the scheduler's round
  uint64_t const* barrier;  // once a thread waits for it, the copy lands soon
  int32_t line;             // of the instruction
  std::function<void()> work;
};

// Which writes of threads the copy engine and wgmma may not see yet: they use shared memory by the
// async proxy, threads by the generic one. Of every 16 bytes: the last write by a thread. It is
// seen after fence.proxy.async of the writer, or of the thread that asks for the access.
class ProxyOrder {
 public:
  void start(uint32_t bytes, uint32_t threads) {
    writes_.assign(bytes / 16 + 1, {});
    fences_.assign(threads, 0);
  }
  void written(uint32_t address, uint32_t bytes, uint32_t thread) {
    for (uint32_t k = address / 16; k <= (address + bytes - 1) / 16; ++k) {
      writes_[k] = {time_, thread + 1};
    }
  }
  // By the async proxy.
  void replaced(uint32_t address, uint32_t bytes) {
    for (uint32_t k = address / 16; k <= (address + bytes - 1) / 16; ++k) {
      writes_[k] = {};
    }
  }
  void fenced(uint32_t thread) { fences_[thread] = ++time_; }
  // Throws Fault if the access reads bytes of a write that it may not see.
  void check(uint32_t address, uint32_t bytes, uint32_t thread) const;

 private:
  struct Write {
    uint32_t time = 0;
    uint32_t thread = 0;  // and 1; 0: none
  };
  std::vector<Write> writes_;
  std::vector<uint32_t> fences_;  // per thread: the time of the last one
  uint32_t time_ = 1;
};

struct Block {
  Dim3 index;
  uint32_t rank = 0;  // in its cluster
  std::shared_ptr<Cluster> cluster;
  SharedMemory shared{nullptr, 0};
  ProxyOrder order;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::vector<LateCopy> late;
  uint32_t live_threads = 0;
  struct Grid* grid = nullptr;
};

// What blocks share.
struct Grid {
  Launch launch;
  Code const* code = nullptr;
  std::mt19937_64 random;
  uint64_t round = 0;
  uint64_t progress = 0;  // counts what other warps could wait for
  bool late = true;       // whether asynchronous work is done as late as may be

  // The round in which a copy lands that starts now, if no thread waits for its barrier before.
  uint64_t landing() { return round + 1 + (late ? 256 : draw(6)); }
  uint32_t draw(uint32_t below) { return static_cast<uint32_t>(random() % below); }
};

inline constexpr uint32_t kReservedShared = 1024;  // bytes at the start, as on sm_90

// Calls f(lane) for each of the lanes.
template <class F>
inline void each_lane(uint32_t lanes, F&& f) {
  while (lanes != 0) {
    int const lane = __builtin_ctz(lanes);
    lanes &= lanes - 1;
    f(lane);
  }
}

// Whether all of the warp's live lanes are here; if not, .aligned instructions wait for them.
inline bool all_here(Warp const& warp, uint32_t lanes) { return (lanes & warp.live) == warp.live; }

// The instruction at a program counter of a block's kernel.
Instruction const& instruction_at(Block const& block, int32_t pc);

[[noreturn]] inline void fault(std::string const& what) { throw Fault(what); }

}  // namespace emulator
