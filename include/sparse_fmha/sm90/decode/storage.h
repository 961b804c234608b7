// Shared memory of a decode kernel.
#pragma once

#include <type_traits>

#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/decode/params.h"
#include "sparse_fmha/sm90/decode/traits.h"

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
  // Votes take more registers.
  static constexpr int kProducerRegisters = kWorkers == 1 ? 128 : Traits::kVotes ? 88 : 72;
  static constexpr int kConsumerRegisters =
      kWorkers == 1 ? (Traits::kVotes ? 256 : 240) : (Traits::kVotes ? 208 : 216);
  static_assert(kWorkers * kProducerWarps <= 4, "the producers of all workers are one warpgroup");
};

// Passes numbers from one thread to warps that all read each.
class NumberQueue {
 public:
  static constexpr int kDepth = 4;
  using State = RingState<kDepth>;

  __device__ __forceinline__ void init(int reader_warps) { ring_.init(reader_warps); }
  // Called by one thread.
  __device__ __forceinline__ void put(State& state, int32_t number) {
    ring_.acquire(state);
    compiler_fence();
    numbers_[state.index] = number;
    compiler_fence();
    ring_.full[state.index].arrive();
    state.advance();
  }
  // Called by whole warps.
  __device__ __forceinline__ int32_t get(State& state) {
    ring_.wait(state);
    compiler_fence();
    int32_t const number = numbers_[state.index];
    compiler_fence();
    __syncwarp();
    ring_.release(state);
    state.advance();
    return number;
  }

 private:
  Ring<kDepth> ring_;
  int32_t numbers_[kDepth];
};

using PartQueue = NumberQueue;  // of the block's parts, to all warps of a worker
using VoteQueue = NumberQueue;  // for each tile, whether it is kept, to those who copy values

// What a worker needs to skip tiles.
struct WorkerVotes {
  VoteQueue queue;
  alignas(16) uint4 weights[4][128];  // of the last kept tile, by consumer thread
};
struct NoWorkerVotes {};

template <class Traits>
struct DecodeWorker {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = Traits::kTileK * Traits::kHeadDim;

  alignas(1024) Element q[Traits::kTileQ * Traits::kHeadDim];
  alignas(1024) Element k[Traits::kStages * kTileElements];
  alignas(1024) Element v[Traits::kValueStages * kTileElements];
  // Of a stage of keys: whether each producer warp found a key there that a row does not see, and,
  // if any did, the keys' positions, or -1.
  bool masked[Traits::kStages][kProducerWarps];
  int32_t positions[Traits::kStages][Traits::kTileK];
  Ring<Traits::kStages> ring_k;
  Ring<Traits::kValueStages> ring_v;
  PartQueue parts;
  float2 sums[Traits::kTileQ];  // of the piece that a cluster merges: reference, and sum
  std::conditional_t<Traits::kVotes, WorkerVotes, NoWorkerVotes> votes;

  __device__ __forceinline__ Element* keys(int stage) { return k + stage * kTileElements; }
  __device__ __forceinline__ Element* values(int stage) { return v + stage * kTileElements; }
  // The result of that piece, [rows, head dim]. It replaces the keys.
  __device__ __forceinline__ float* partial() { return reinterpret_cast<float*>(k); }
  static_assert(sizeof(k) >= Traits::kTileQ * Traits::kHeadDim * sizeof(float),
                "the result of a piece fits in the stages of keys");
  __device__ __forceinline__ void set_masked(int stage, int warp, bool is) {
    masked[stage][warp] = is;
  }
  __device__ __forceinline__ void set_position(int stage, int slot, int32_t position) {
    positions[stage][slot] = position;
  }
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
