// Shapes, parameters and shared memory of the kernel for groups of query blocks.
#pragma once

#include <cuda.h>

#include "sparse_fmha/device/list_groups.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/tile_config.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

// The tiles of one member: 64 queries, and stages of 64 keys or values.
template <class Element>
struct GroupTraits
    : TileTraits<TileConfig<BlockSparse, Element, 128, ListGroup::kBlock, ListGroup::kBlock, 11>> {
  static constexpr int kMembers = ListGroup::kMembers;
  static constexpr int kTileElements = ListGroup::kBlock * 128;
  static constexpr int kBytes = kTileElements * 2;  // of queries, of a stage
  static constexpr int kWarps = 4 * kMembers;       // of consumers
  // A consumer keeps the values of its last entry until it has the keys of the next one, if these
  // are so many entries away. They share the ring: it has room for them, or none would get on.
  static constexpr uint32_t kNear = 2;
  static_assert(2 * kNear < GroupTraits::kStages,
                "the keys do not wait for the stage of the values");
  static constexpr int kThreads = 128 * (kMembers + 1);
  // 64K registers: three consumers and the producers' warpgroup.
  static constexpr int kConsumerRegisters = 160;
  static constexpr int kProducerRegisters = 32;
};

template <class Traits>  // of one kernel: launches tell kernels apart by it
struct GroupParams {
  CUtensorMap q;    // (D, Lq, Hq, B)
  CUtensorMap k;    // (D, Lkv, Hkv, B)
  CUtensorMap v;    // (D, Lkv, Hkv, B)
  CUtensorMap out;  // (D, Lq, Hq, B)
  float* lse;       // [B, Lq, Hq]
  int32_t len_q;
  int32_t len_kv;
  int32_t heads_q;
  int32_t heads_per_kv;
  float scale_log2;  // |scale| * log2(e), never zero
  bool negate;       // the scale is negative
  device::GroupSizes sizes;
  device::GroupPlan plan;
  device::Scheduler scheduler;
};

// A group that consumers and producers work on.
struct GroupWork {
  device::WorkTile tile;  // its q_tile is the group
  GroupEntry const* entries;
  int32_t count;
};

template <class Traits>
struct GroupStorage {
  using Element = typename Traits::Element;

  alignas(1024) Element q[Traits::kMembers * Traits::kTileElements];  // the output replaces them
  alignas(1024) Element ring[Traits::kStages * Traits::kTileElements];
  FullBarrier full[Traits::kStages];
  EmptyBarrier empty[Traits::kStages];
  FullBarrier full_q[Traits::kMembers];
  uint32_t begun;  // tiles whose copies have begun
  FullBarrier full_work;
  EmptyBarrier empty_work;
  GroupWork work;

  // By one thread.
  __device__ __forceinline__ void init() {
    begun = 0;
    for (int i = 0; i < Traits::kStages; ++i) {
      full[i].init(1);
      empty[i].init(Traits::kWarps);
    }
    for (auto& barrier : full_q) {
      barrier.init(1);
    }
    full_work.init(1);
    empty_work.init(Traits::kWarps + 1);  // and the warp that copies
    cutlass::arch::fence_barrier_init();
  }
  // By the thread that began the copy of the last of `tiles`, and by those that wait for it.
  __device__ __forceinline__ void begin_tiles(uint32_t tiles) {
    asm volatile(
        "st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(&begun)),
        "r"(tiles)
        : "memory");
  }
  __device__ __forceinline__ uint32_t tiles_begun() {
    uint32_t tiles;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                 : "=r"(tiles)
                 : "r"(cute::cast_smem_ptr_to_uint(&begun))
                 : "memory");
    return tiles;
  }
  // The n-th group of the thread block. By a whole warp.
  __device__ __forceinline__ GroupWork take(uint32_t n) {
    full_work.wait(n & 1);
    compiler_fence();
    GroupWork const result = work;
    compiler_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      empty_work.arrive();
    }
    return result;
  }
};

// The place in the ring of the n-th tile since the thread block began: keys of entry i are tile
// 2i, its values 2i + 1.
template <class Traits>
struct GroupSlot {
  uint32_t index;
  uint32_t phase;
  __device__ __forceinline__ explicit GroupSlot(uint32_t n)
      : index(n % Traits::kStages), phase(n / Traits::kStages & 1) {}
};

// A list, read by a warp 32 entries at a time, one chunk ahead.
struct GroupChunks {
  GroupEntry const* const entries;
  int32_t const count;
  int32_t at = 0;  // first entry of the next chunk
  int32_t word;    // the lane's entry of it

  __device__ __forceinline__ GroupChunks(GroupWork const& work)
      : entries(work.entries), count(work.count) {
    fetch();
  }
  // The lane's entry of the next chunk; zero behind the end.
  __device__ __forceinline__ GroupEntry next() {
    int32_t const result = word;
    at += 32;
    fetch();
    return {result};
  }

 private:
  __device__ __forceinline__ void fetch() {
    int32_t const i = at + static_cast<int32_t>(threadIdx.x % 32);
    word = i < count ? __ldg(&entries[i].word) : 0;
  }
};

}  // namespace sparse_fmha::sm90
