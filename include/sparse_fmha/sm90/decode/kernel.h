// Decode attention of up to 64 packed rows: a persistent kernel.
#pragma once

#include "sparse_fmha/sm90/decode/consumer.h"
#include "sparse_fmha/sm90/decode/producer.h"

namespace sparse_fmha::sm90 {

// The plan that this block reads: its own, or that of decode_plan_kernel.
template <class Traits>
__device__ __forceinline__ DecodePlan plan_of(DecodeParams const& params,
                                              DecodeStorage<Traits>& smem) {
  if (params.planned) {
    cudaGridDependencySynchronize();
    __syncthreads();
    return params.plan;
  }
  DecodePlan const plan = {smem.first, smem.tiles};
  plan_groups(params, plan, smem.warp_units);
  return plan;
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
    decode_attention_kernel(BoxedDecodeParams const __grid_constant__ params) {
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
  DecodePlan const plan = plan_of(params, smem);  // synchronises the block
  int32_t const workers = gridDim.x * DecodeRoles<Traits>::kWorkers;
  DecodeParts const cut = params.parts(plan.first[params.groups], workers);

  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  PartQueue::State reads = {};
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<DecodeRoles<Traits>::kProducerRegisters>();
    int const index = warp / kProducerWarps;
    int const of_worker = warp % kProducerWarps;
    auto& worker = smem.workers[index % DecodeRoles<Traits>::kWorkers];
    PartQueue::State puts = {};
    PartSource source{params, workers, static_cast<int32_t>(index * gridDim.x + blockIdx.x)};
    auto run = [&](auto producer) {
      for (;;) {
        if (of_worker == 0 && threadIdx.x % 32 == 0) {
          worker.parts.put(puts, source.take());
        }
        __syncwarp();
        int32_t const part = worker.parts.get(reads);
        if (part >= cut.count()) {
          return;
        }
        for_each_piece(params, plan, cut, part,
                       [&](DecodePiece const& piece) { producer.load(piece); });
      }
    };
    if (index >= DecodeRoles<Traits>::kWorkers) {
      return;
    }
    if (boxes) {
      run(Boxes{params, worker, of_worker});
    } else {
      run(Rows{params, worker, of_worker});
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<DecodeRoles<Traits>::kConsumerRegisters>();
    DecodeConsumer<Traits> consumer{params, smem.workers[warpgroup - 1], warpgroup - 1};
    for (;;) {
      int32_t const part = consumer.smem.parts.get(reads);
      if (part >= cut.count()) {
        break;
      }
      consumer.results.begin_part(part);
      for_each_piece(params, plan, cut, part,
                     [&](DecodePiece const& piece) { consumer.attend(piece); });
    }
    int32_t const worker = blockIdx.x * DecodeRoles<Traits>::kWorkers + warpgroup - 1;
    consumer.results.store_empty_groups(plan, worker, workers);
    consumer.results.clear_merges_from(cut.count(), worker, workers);
  }
}

}  // namespace sparse_fmha::sm90
