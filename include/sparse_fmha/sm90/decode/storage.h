// Shared memory of a decode kernel.
#pragma once

#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/tile_traits.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

inline constexpr int kProducerWarps = 2;    // of a worker
inline constexpr int kPlannedGroups = 512;  // that each block plans by itself

// A block has two workers with parts of their own, so that one streams keys while the other begins
// or ends a piece; one if two outputs do not fit the registers. A worker is two producer warps and
// a consumer warpgroup.
template <class Traits>
struct DecodeRoles {
  static constexpr int kWorkers = Traits::kHeadDim <= 128 ? 2 : 1;
  static constexpr int kThreads = 128 + kWorkers * 128;
  static constexpr int kProducerRegisters = kWorkers == 2 ? 72 : 128;
  static constexpr int kConsumerRegisters = kWorkers == 2 ? 216 : 240;
  static_assert(kWorkers * kProducerWarps <= 4, "the producers of all workers are one warpgroup");
};

// Passes the numbers of the block's parts to all warps.
class PartQueue {
 public:
  static constexpr int kDepth = 4;
  using State = RingState<kDepth>;

  __device__ __forceinline__ void init(int reader_warps) { ring_.init(reader_warps); }
  // Called by one thread.
  __device__ __forceinline__ void put(State& state, int32_t part) {
    ring_.acquire(state);
    compiler_fence();
    parts_[state.index] = part;
    compiler_fence();
    ring_.full[state.index].arrive();
    state.advance();
  }
  // Called by whole warps.
  __device__ __forceinline__ int32_t get(State& state) {
    ring_.wait(state);
    compiler_fence();
    int32_t const part = parts_[state.index];
    compiler_fence();
    __syncwarp();
    ring_.release(state);
    state.advance();
    return part;
  }

 private:
  Ring<kDepth> ring_;
  int32_t parts_[kDepth];
};

template <class Traits>
struct DecodeWorker {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = Traits::kTileK * Traits::kHeadDim;

  alignas(1024) Element q[Traits::kTileQ * Traits::kHeadDim];
  alignas(1024) Element k[Traits::kStages * kTileElements];
  alignas(1024) Element v[Traits::kStages * kTileElements];
  // Of a stage of keys: whether each producer warp found a key there that a row does not see, and,
  // if any did, the keys' positions, or -1.
  bool masked[Traits::kStages][kProducerWarps];
  int32_t positions[Traits::kStages][Traits::kTileK];
  Ring<Traits::kStages> ring_k;
  Ring<Traits::kStages> ring_v;
  PartQueue parts;

  __device__ __forceinline__ Element* keys(int stage) { return k + stage * kTileElements; }
  __device__ __forceinline__ Element* values(int stage) { return v + stage * kTileElements; }
  __device__ __forceinline__ bool is_masked(int stage) const {
    return masked[stage][0] | masked[stage][1];
  }
};

template <class Traits>
struct DecodeStorage {
  DecodeWorker<Traits> workers[DecodeRoles<Traits>::kWorkers];
  int32_t warp_units[DecodeRoles<Traits>::kThreads / 32];
  int32_t first[kPlannedGroups + 1];
  KeyRange tiles[kPlannedGroups];
};

}  // namespace sparse_fmha::sm90
