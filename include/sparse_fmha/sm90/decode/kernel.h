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
  if (blockIdx.x == 0) {  // for the merge
    for (int i = threadIdx.x; i <= params.groups; i += blockDim.x) {
      params.plan.first[i] = plan.first[i];
    }
  }
  return plan;
}

template <class Traits>
__global__ void __launch_bounds__(DecodeRoles::kThreads, 1)
    decode_attention_kernel(DecodeParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<DecodeStorage<Traits>*>(raw_smem);
  bool const boxes = params.box > 0;
  cudaTriggerProgrammaticLaunchCompletion();  // the merge may be launched: it waits by itself
  if (threadIdx.x == 0) {
    smem.ring_k.init(4, boxes ? BoxProducer<Traits>::kArrivals : RowProducer<Traits>::kArrivalsK);
    smem.ring_v.init(4, boxes ? BoxProducer<Traits>::kArrivals : RowProducer<Traits>::kArrivalsV);
    cutlass::arch::fence_barrier_init();
  }
  DecodePlan const plan = plan_of(params, smem);  // synchronises the block

  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<DecodeRoles::kProducerRegisters>();
    if (!boxes) {
      RowProducer<Traits> producer{params, smem};
      for_each_piece(params, plan, [&](DecodePiece const& piece) { producer.load(piece); });
    } else if (threadIdx.x < 32) {
      BoxProducer<Traits> producer{params, smem};
      for_each_piece(params, plan, [&](DecodePiece const& piece) { producer.load(piece); });
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<DecodeRoles::kConsumerRegisters>();
    DecodeConsumer<Traits> consumer{params, smem, warpgroup - 1};
    for_each_piece(params, plan, [&](DecodePiece const& piece) { consumer.attend(piece); });
    int32_t const begin = blockIdx.x * DecodeRoles::kConsumers + consumer.warpgroup;
    for (int32_t group = begin; group < params.groups;
         group += gridDim.x * DecodeRoles::kConsumers) {
      if (plan.first[group] == plan.first[group + 1]) {
        consumer.store_empty(params.group(group));
      }
    }
  }
}

}  // namespace sparse_fmha::sm90
