// The kernel: who plays which part.
#pragma once

#include "sparse_fmha/sm90/consumer.h"
#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/producer.h"
#include "sparse_fmha/sm90/traits.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_kernel(KernelParams<Geometry, Mechanism> const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<SharedStorage<Traits, Geometry>*>(raw_smem);
  Geometry const geometry{params, smem.geometry};

  if (threadIdx.x == 0) {
    for (auto& ring : smem.ring_q) {
      ring.init(4);
    }
    // Where rows are gathered each lane arrives, and one of them also for tensor copies.
    constexpr int kProducers = Geometry::kGathers ? 33 : 1;
    smem.ring_k.init(Traits::kConsumerWarps, kProducers);
    smem.ring_v.init(Traits::kConsumerWarps, kProducers);
    smem.work.init(Traits::kConsumerThreads + Producer<Traits, Geometry, Mechanism>::kThreads);
    cutlass::arch::fence_barrier_init();
  }
  geometry.init();
  __syncthreads();

  // Gathering takes registers, from each of two consumers.
  constexpr int kMoved = Geometry::kGathers ? 8 : 0;
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters + 2 * kMoved>();
    int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    Producer<Traits, Geometry, Mechanism> producer{params, smem, geometry};
    if (warp == 0) {
      producer.run_keys();
    } else if (threadIdx.x % 32 == 0) {
      if (warp == 1) {
        producer.run_work();
      } else if (warp <= Traits::kConsumers) {
        producer.run_queries(warp - 1);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters - kMoved>();
    Consumer<Traits, Geometry, Mechanism>{params, smem, geometry, warpgroup - 1, {}}.run();
  }
}

}  // namespace sparse_fmha::sm90
