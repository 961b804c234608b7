// The producer warps of the kernel for groups: one hands out groups, one copies keys and values.
#pragma once

#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/list_groups/storage.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct GroupProducer {
  GroupParams<Traits> const& params;
  GroupStorage<Traits>& smem;

  // By one thread.
  __device__ __forceinline__ void run_work() {
    for (uint32_t n = 0;; ++n) {
      // Taken only when the group before begins: a block that takes its next group too early leaves
      // others idle at the end.
      smem.empty_work.wait((n & 1) ^ 1);
      GroupWork const work = find(params.scheduler.decode(n == 0 ? static_cast<int32_t>(blockIdx.x)
                                                                 : params.scheduler.take()));
      compiler_fence();
      smem.work = work;
      compiler_fence();
      smem.full_work.arrive();
      if (work.tile.batch < 0) {
        return;
      }
    }
  }

  // By a whole warp.
  __device__ __forceinline__ void run_tiles() {
    uint32_t tile = 0;
    for (uint32_t n = 0;; ++n) {
      GroupWork const work = smem.take(n);
      if (work.tile.batch < 0) {
        return;
      }
      int32_t const head = work.tile.head / params.heads_per_kv;
      GroupChunks chunks(work);
      CUTE_NO_UNROLL
      for (int32_t left = work.count; left > 0; left -= 32) {
        GroupEntry const mine = chunks.next();
        int32_t const many = left < 32 ? left : 32;
        CUTE_NO_UNROLL
        for (int32_t i = 0; i < many; ++i) {
          GroupEntry const entry{__shfl_sync(0xffffffff, mine.word, i)};
          copy(params.k, entry, head, work.tile.batch, tile++);
          copy(params.v, entry, head, work.tile.batch, tile++);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ GroupWork find(device::WorkTile tile) const {
    if (tile.batch < 0) {
      return {tile, nullptr, 0};
    }
    auto const& sizes = params.sizes;
    int64_t const list = tile.batch * sizes.batch_stride + tile.head * sizes.head_stride;
    // The scheduler counts down.
    tile.q_tile = params.plan.order[list + sizes.groups - 1 - tile.q_tile];
    int64_t const group = list + tile.q_tile;
    return {tile, params.plan.entries + group * sizes.width, params.plan.counts[group]};
  }

  __device__ __forceinline__ void copy(CUtensorMap const& map, GroupEntry entry, int32_t head,
                                       int32_t batch, uint32_t tile) {
    GroupSlot<Traits> const slot(tile);
    smem.empty[slot.index].wait(slot.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      arrive_for(smem.empty[slot.index], 4 * (Traits::kMembers - __popc(entry.members())));
      auto& full = smem.full[slot.index];
      full.arrive_and_expect_tx(Traits::kBytes);
      load_box<128>(map, full, smem.ring + slot.index * Traits::kTileElements, ListGroup::kBlock,
                    kReadByMany, entry.block() * ListGroup::kBlock, head, batch);
      smem.begin_tiles(tile + 1);
    }
    __syncwarp();
  }

  // Arrives for the warps of consumers that do not read the stage.
  static __device__ __forceinline__ void arrive_for(EmptyBarrier& barrier, uint32_t warps) {
    if (warps > 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(
                       cute::cast_smem_ptr_to_uint(&barrier)),
                   "r"(warps)
                   : "memory");
    }
  }
};

}  // namespace sparse_fmha::sm90
