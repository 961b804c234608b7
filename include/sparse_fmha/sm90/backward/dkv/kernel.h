// The dK/dV kernel: the role of each warp.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/consumer.h"
#include "sparse_fmha/sm90/backward/dkv/dq_consumer.h"
#include "sparse_fmha/sm90/backward/dkv/producer.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_kernel_dkv(DkvParams<Geometry, Mechanism> const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<StorageOf<Traits, Geometry>*>(raw_smem);
  Geometry const geometry{params, smem.geometry};
  using Producer = DkvProducer<Traits, Geometry, Mechanism>;

  if (threadIdx.x == 0) {
    smem.ring_keys.init(Traits::kConsumerWarps + (Traits::kDqByWarpgroup ? Traits::kDqWarps : 0));
    smem.keys_read.init(Traits::kConsumerWarps);
    smem.ring_q.init(Traits::kConsumerWarps, 1 + 32 * Geometry::kMaskWarp);
    smem.ring_dout.init(Traits::kConsumerWarps);
    smem.work.init(Traits::kThreads - 128 + Producer::kReaders);
    if constexpr (Traits::kAddsDq) {
      smem.ring_grads.init(Traits::kDqWarps, Traits::kConsumerWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  geometry.init();
  __syncthreads();

  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    Producer producer{params, smem, geometry};
    if (warp == 0) {
      producer.run_loads();
    } else if (Geometry::kMaskWarp && warp == 2) {
      if constexpr (Geometry::kMaskWarp) {
        producer.run_masks();
      }
    } else if (threadIdx.x == 32) {
      producer.run_work();
    }
  } else if (Traits::kDqByWarpgroup && warpgroup == 1 + Traits::kConsumers) {
    if constexpr (Traits::kDqByWarpgroup) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kDqRegisters>();
      DqConsumer<Traits, Geometry, Mechanism>{params, smem, geometry}.run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    int const consumer = warpgroup - 1;
    if constexpr (Traits::kRoles == Roles::kBoth) {
      DkvConsumer<Traits, Geometry, Mechanism, true, true>{params, smem, geometry, consumer,
                                                           consumer}
          .run();
    } else if (consumer == 0) {
      DkvConsumer<Traits, Geometry, Mechanism, false, true>{params, smem, geometry, consumer, 0}
          .run();
    } else {
      DkvConsumer<Traits, Geometry, Mechanism, true, false>{params, smem, geometry, consumer, 0}
          .run();
    }
  }
}

}  // namespace sparse_fmha::sm90
