// Shared memory of a decode kernel.
#pragma once

#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/tile_traits.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

// The roles of a block's warpgroups: one copies, and two take turns at the tiles of a piece.
struct DecodeRoles {
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kPlannedGroups = 512;  // that each block plans by itself
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
    parts_[state.index] = part;
    ring_.full[state.index].arrive();
    state.advance();
  }
  // Called by whole warps.
  __device__ __forceinline__ int32_t get(State& state) {
    ring_.wait(state);
    compiler_fence();
    int32_t const part = parts_[state.index];
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
struct DecodeStorage {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = Traits::kTileK * Traits::kHeadDim;

  // The queries; at the end of a piece, half of the second consumer's output at a time.
  alignas(1024) Element q[Traits::kTileQ * Traits::kHeadDim];
  alignas(1024) Element k[Traits::kStages * kTileElements];
  alignas(1024) Element v[Traits::kStages * kTileElements];
  // Of a stage of keys: whether warp w of the producer found a key there that a row does not see,
  // and, if any did, the keys' positions, or -1.
  alignas(16) bool masked[Traits::kStages][4];
  int32_t positions[Traits::kStages][Traits::kTileK];
  float4 second[128];  // the second consumer's maxima and sums
  Ring<Traits::kStages> ring_k;
  Ring<Traits::kStages> ring_v;
  PartQueue parts;
  int32_t warp_units[DecodeRoles::kThreads / 32];
  int32_t first[DecodeRoles::kPlannedGroups + 1];
  KeyRange tiles[DecodeRoles::kPlannedGroups];

  __device__ __forceinline__ Element* keys(int stage) { return k + stage * kTileElements; }
  __device__ __forceinline__ Element* values(int stage) { return v + stage * kTileElements; }
};

}  // namespace sparse_fmha::sm90
