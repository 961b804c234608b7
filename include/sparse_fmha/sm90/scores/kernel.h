// The kernel that reduces scores: the role of each warp. A thread block has one held tile.
#pragma once

#include "sparse_fmha/sm90/scores/consumer.h"
#include "sparse_fmha/sm90/scores/producer.h"
#include "sparse_fmha/sm90/scores/reductions.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Reduction>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    reduce_scores(ScoreParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<ScoreStorage<Traits, typename Reduction::Shared>*>(raw_smem);
  if (threadIdx.x == 0) {
    smem.ring_held.init(Traits::kConsumerWarps);
    smem.ring.init(Traits::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  WorkTile const tile = params.scheduler.decode(blockIdx.x);
  using Held = typename Reduction::Held;
  ScoreWork work = {Held::tile(params, tile.q_tile), tile.q_tile % params.parts, tile.head,
                    tile.batch};
  Held::find_range(params, work);
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (__shfl_sync(0xffffffff, threadIdx.x / 32, 0) == 0) {
      ScoreProducer<Traits, Reduction>{params, smem, work}.run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    ScoreConsumer<Traits, Reduction>{params, smem, work, warpgroup - 1}.run();
  }
}

}  // namespace sparse_fmha::sm90
