// Decode attention of up to 64 packed rows: a persistent kernel with a producer and two consumers.
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

// Hands out the parts of a block, to one thread.
struct PartSource {
  DecodeParams const& params;
  int32_t base = 0;
  int32_t step = blockIdx.x;

  // The next part, perhaps none. The counter's answer is not waited for before the next call.
  __device__ __forceinline__ int32_t take() {
    int32_t const part = base + step;
    base = params.next != nullptr ? gridDim.x : part;
    step = params.next != nullptr ? atomicAdd(params.next, 1) : gridDim.x;
    return part;
  }
};

template <class Traits>
__global__ void __launch_bounds__(DecodeRoles::kThreads, 1)
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
    smem.ring_k.init(4, boxes ? Boxes::kArrivals : Rows::kArrivalsK);
    smem.ring_v.init(4, boxes ? Boxes::kArrivals : Rows::kArrivalsV);
    smem.parts.init(DecodeRoles::kConsumerThreads / 32 + (boxes ? Boxes::kWarps : Rows::kWarps));
    cutlass::arch::fence_barrier_init();
  }
  DecodePlan const plan = plan_of(params, smem);  // synchronises the block
  DecodeParts const cut = params.parts(plan.first[params.groups], gridDim.x);

  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *params.count = cut.count();
  }

  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  PartQueue::State reads = {};
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<DecodeRoles::kProducerRegisters>();
    PartQueue::State puts = {};
    PartSource source{params};
    auto run = [&](auto producer) {
      for (;;) {
        if (threadIdx.x == 0) {
          smem.parts.put(puts, source.take());
        }
        __syncwarp();
        int32_t const part = smem.parts.get(reads);
        if (part >= cut.count()) {
          return;
        }
        for_each_piece(params, plan, cut, part,
                       [&](DecodePiece const& piece) { producer.load(piece); });
      }
    };
    if (!boxes) {
      run(Rows{params, smem});
    } else if (warp < Boxes::kWarps) {
      run(Boxes{params, smem, warp});
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<DecodeRoles::kConsumerRegisters>();
    DecodeConsumer<Traits> consumer{params, smem, warpgroup - 1};
    for (;;) {
      int32_t const part = smem.parts.get(reads);
      if (part >= cut.count()) {
        break;
      }
      if (threadIdx.x == DecodeRoles::kThreads - 1) {
        params.merges[part] = merge_of(params, plan, cut, part);
      }
      for_each_piece(params, plan, cut, part,
                     [&](DecodePiece const& piece) { consumer.attend(piece); });
    }
    consumer.store_empty_groups(plan);
  }
}

}  // namespace sparse_fmha::sm90
