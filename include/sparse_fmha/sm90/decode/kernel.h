// Decode attention of up to 64 packed rows: a persistent kernel.
#pragma once

#include "sparse_fmha/sm90/decode/cluster.h"
#include "sparse_fmha/sm90/decode/consumer.h"
#include "sparse_fmha/sm90/decode/producer.h"

namespace sparse_fmha::sm90 {

// The plan that this block reads: its own, or that of decode_plan_kernel.
template <class Traits>
__device__ __forceinline__ DecodePlan plan_of(DecodeParams const& params,
                                              DecodeStorage<Traits>& smem, int32_t first_group) {
  DecodePlan const own = {smem.first, smem.tiles};
  if (params.cluster > 0) {
    if (threadIdx.x == 128) {
      plan_one_group(params, first_group, own);
    }
    __syncthreads();
    return own;
  }
  if (params.planned) {
    cudaGridDependencySynchronize();
    __syncthreads();
    return params.plan;
  }
  plan_groups(params, own, smem.warp_units);
  return own;
}

// Hands out the parts of a worker, to one thread.
struct PartSource {
  DecodeParams const& params;
  int32_t const workers;
  int32_t base;
  int32_t step = 0;

  // The next part, perhaps none. The counter's answer is not waited for before the next call.
  __device__ __forceinline__ int32_t take() {
    int32_t const part = base + step;
    base = params.next != nullptr ? workers : part;
    step = params.next != nullptr ? atomicAdd(params.next, 1) : workers;
    return part;
  }
};

template <class Traits>
__global__ void __launch_bounds__(DecodeRoles<Traits>::kThreads, 1)
    decode_attention_kernel(DecodeParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<DecodeStorage<Traits>*>(raw_smem);
  using Boxes = BoxProducer<Traits>;
  using Rows = RowProducer<Traits>;
  bool const boxes = params.box > 0;
  cudaTriggerProgrammaticLaunchCompletion();  // the merge may be launched: it waits by itself
  if (threadIdx.x == 0) {
    if (boxes) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.k_map));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.v_map));
    }
    for (auto& worker : smem.workers) {
      worker.ring_k.init(4, boxes ? Boxes::kArrivals : Rows::kArrivalsK);
      worker.ring_v.init(4, boxes ? Boxes::kArrivals : Rows::kArrivalsV);
      worker.parts.init(4 + kProducerWarps);
      if constexpr (Traits::kVotes) {
        worker.votes.queue.init(boxes ? 1 : kProducerWarps);  // whose warps copy values
      }
    }
    cutlass::arch::fence_barrier_init();
  }
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  int const of_block = warpgroup == 0 ? warp / kProducerWarps : warpgroup - 1;
  DecodeTeam const team(params, of_block, DecodeRoles<Traits>::kWorkers);
  DecodePlan const plan = plan_of(params, smem, team.first_group);  // synchronises the block
  DecodeParts const cut = params.parts(plan.first[team.groups], team.workers);
  int32_t const parts = cut.count() * params.lines;
  PartQueue::State reads = {};
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<DecodeRoles<Traits>::kProducerRegisters>();
    int const of_worker = warp % kProducerWarps;
    auto& worker = smem.workers[of_block % DecodeRoles<Traits>::kWorkers];
    PartQueue::State puts = {};
    PartSource source{params, team.workers, team.worker};
    auto run = [&](auto producer) {
      for (;;) {
        if (of_worker == 0 && threadIdx.x % 32 == 0) {
          worker.parts.put(puts, source.take());
        }
        __syncwarp();
        int32_t const part = worker.parts.get(reads);
        if (part >= parts) {
          return;
        }
        for_each_piece(params, plan, team, cut, part,
                       [&](DecodePiece const& piece) { producer.load(piece); });
      }
    };
    if (of_block >= DecodeRoles<Traits>::kWorkers) {
      return;
    }
    if (boxes) {
      run(Boxes{params, worker, of_worker});
    } else {
      run(Rows{params, worker, of_worker});
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<DecodeRoles<Traits>::kConsumerRegisters>();
    DecodeConsumer<Traits> consumer{params, smem.workers[of_block], of_block};
    for (;;) {
      int32_t const part = consumer.smem.parts.get(reads);
      if (part >= parts) {
        break;
      }
      consumer.begin_part(part);
      for_each_piece(params, plan, team, cut, part,
                     [&](DecodePiece const& piece) { consumer.attend(piece); });
    }
    consumer.store_empty_groups(plan, team);
    consumer.clear_merges_from(parts, team);
    if (params.cluster > 0 && parts > 1) {
      ClusterMerge<Traits>::run(params, smem, team, parts);
    }
  }
}

}  // namespace sparse_fmha::sm90
