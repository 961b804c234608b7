// Decode attention of up to 64 packed rows: a persistent kernel.
#pragma once

#include "sparse_fmha/sm90/decode/cluster.h"
#include "sparse_fmha/sm90/decode/consumer.h"
#include "sparse_fmha/sm90/decode/producer.h"

namespace sparse_fmha::sm90 {

// Makes the plan of this block's team. Called by all consumers.
template <class Traits>
__device__ __forceinline__ void make_plan(DecodeParams const& params, DecodeTeam const& team,
                                          DecodePlan const& plan, DecodeStorage<Traits>& smem) {
  int const thread = static_cast<int>(threadIdx.x) - 128;
  if (params.cluster > 0) {
    if (thread == 0) {
      plan_one_group(params, team.first_group, plan);
    }
  } else if (!params.planned) {
    plan_groups<DecodeRoles<Traits>::kWorkers * 128>(params, plan, smem.warp_units, thread);
  }
}

// Waits for the plan, and for barriers in shared memory. Called by all threads of a block.
template <class Traits>
__device__ __forceinline__ void wait_for_plan(DecodeParams const& params) {
  if (params.planned) {
    cudaGridDependencySynchronize();
  }
  cutlass::arch::NamedBarrier::sync(DecodeRoles<Traits>::kThreads, kPlannedBarrier);
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
  __syncwarp();
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  int const of_block = warpgroup == 0 ? warp / kProducerWarps : warpgroup - 1;
  DecodeTeam const team(params, of_block, DecodeRoles<Traits>::kWorkers);
  DecodePlan const plan = params.planned ? params.plan : DecodePlan{smem.first, smem.tiles};
  auto const cut_of_plan = [&] { return params.parts(plan.first[team.groups], team.workers); };
  PieceWalk pieces(params, team);
  PartQueue::State reads = {};
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<DecodeRoles<Traits>::kProducerRegisters>();
    int const of_worker = warp % kProducerWarps;
    auto& worker = smem.workers[of_block % DecodeRoles<Traits>::kWorkers];
    PartQueue::State puts = {};
    PartSource source{params, team.workers, team.worker};
    auto run = [&](auto producer) {
      // The first turn has no keys: it fetches code and parameters while the plan is made.
      DecodePiece piece = pieces.none();
      DecodeParts cut(0);
      int32_t parts = 0;
      CUTE_NO_UNROLL
      for (;;) {
        producer.load(piece);
        if (piece.part < 0) {
          wait_for_plan<Traits>(params);
          cut = cut_of_plan();
          parts = cut.count() * params.lines;
        }
        CUTE_NO_UNROLL
        while (!pieces.next(plan, cut, piece)) {
          if (of_worker == 0 && threadIdx.x % 32 == 0) {
            worker.parts.put(puts, source.take());
          }
          __syncwarp();
          int32_t const part = worker.parts.get(reads);
          if (part >= parts) {
            return;
          }
          pieces.begin(plan, cut, part);
        }
      }
    };
    if (of_block >= DecodeRoles<Traits>::kWorkers) {
      wait_for_plan<Traits>(params);
      return;
    }
    if (boxes) {
      run(Boxes{params, worker, of_worker});
    } else {
      run(Rows{params, worker, of_worker});
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<DecodeRoles<Traits>::kConsumerRegisters>();
    make_plan(params, team, plan, smem);
    wait_for_plan<Traits>(params);
    DecodeParts const cut = cut_of_plan();
    int32_t const parts = cut.count() * params.lines;
    DecodeConsumer<Traits> consumer{params, smem.workers[of_block], of_block};
    for (;;) {
      int32_t const part = consumer.smem.parts.get(reads);
      if (part >= parts) {
        break;
      }
      consumer.begin_part(part);
      pieces.begin(plan, cut, part);
      DecodePiece piece;
      CUTE_NO_UNROLL
      while (pieces.next(plan, cut, piece)) {
        consumer.attend(piece);
      }
    }
    consumer.store_empty_groups(plan, team);
    consumer.clear_merges_from(parts, team);
    if (params.cluster > 0 && parts > 1) {
      ClusterMerge<Traits>::run(params, smem, team, parts);
    }
  }
}

}  // namespace sparse_fmha::sm90
