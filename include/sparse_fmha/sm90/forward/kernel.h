// The forward kernel: the role of each warp.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/forward/producer.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

// Threads of the producer warpgroup, the consumers, and a gather warpgroup if there is one.
template <class Traits, class Geometry>
inline constexpr int kBlockThreads = Traits::kThreads + 32 * Geometry::kGatherWarps;

template <class Traits, class Geometry, class Mechanism>
__global__ void __launch_bounds__((kBlockThreads<Traits, Geometry>), Traits::kBlocks)
    attention_kernel(KernelParams<Geometry, Mechanism> const __grid_constant__ params) {
  // Checked here because the host compiler does not know the return types of device functions.
  static_assert(is_geometry<Geometry, Traits>());
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<SharedStorage<Traits, Geometry>*>(raw_smem);
  Geometry const geometry{params, smem.geometry};

  if (threadIdx.x == 0) {
    for (auto& ring : smem.ring_q) {
      ring.init(4);
    }
    // Arrivals per stage: each lane that gathers or computes masks, and one for TMA copies.
    constexpr int kGatherers = Producer<Traits, Geometry, Mechanism>::kRowWarps;
    constexpr int kProducers = 1 + (kGathers<Geometry> ? 32 * kGatherers : 0);
    smem.ring_k.init(Traits::kConsumerWarps, kProducers + 32 * kMaskWarps<Geometry>);
    smem.ring_v.init(Traits::kConsumerWarps, kProducers);
    smem.work.init(Traits::kConsumerThreads + Producer<Traits, Geometry, Mechanism>::kThreads);
    cutlass::arch::fence_barrier_init();
  }
  geometry.init();
  __syncthreads();

  // Gathering takes registers from both consumers. It runs in its own warpgroup or in the
  // producer's.
  constexpr bool kMoreWarps = Geometry::kGatherWarps > 0;
  constexpr int kMoved = kGathers<Geometry> ? Traits::kMovedRegisters : 0;
  constexpr int kConsumerRegisters = Traits::kConsumerRegisters - kMoved;
  constexpr int kGatherRegisters = 256 - kConsumerRegisters;  // as for the producer's warpgroup
  constexpr int kProducerRegisters =
      kMoreWarps ? kGatherRegisters : Traits::kProducerRegisters + 2 * kMoved;
  using Producers = Producer<Traits, Geometry, Mechanism>;
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    Producers producer{params, smem, geometry};
    if (warp == 0) {
      if constexpr (kWarpLoads<Geometry>) {
        producer.template run_boxes<false>();
      } else {
        producer.run_keys();
      }
    } else if (kWarpLoads<Geometry> && warp == 3) {
      static_assert(!kWarpLoads<Geometry> || Traits::kConsumers == 2, "a warp is left for values");
      if constexpr (kWarpLoads<Geometry>) {
        producer.template run_boxes<true>();
      }
    } else if (kMaskWarps<Geometry> > 0 && warp == 3) {
      static_assert(kMaskWarps<Geometry> == 0 || Traits::kConsumers == 2,
                    "a warp is left for masks");
      if constexpr (kMaskWarps<Geometry> > 0) {
        producer.run_masks();
      }
    } else if (warp == 1 && kWarpLoads<Geometry>) {
      producer.run_work();
    } else if (threadIdx.x % 32 == 0) {
      if (warp == 1) {
        producer.run_work();
      } else if (warp <= Traits::kConsumers) {
        producer.run_queries(warp - 1);
      }
    }
  } else if (kMoreWarps && warpgroup > Traits::kConsumers) {
    if constexpr (kMoreWarps) {
      cutlass::arch::warpgroup_reg_dealloc<kGatherRegisters>();
      int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
      Producers{params, smem, geometry}.run_rows(warp);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    int const consumer = warpgroup - 1;
    using Consumer = typename Traits::template ConsumerOf<Geometry, Mechanism>;
    Consumer{params, smem, geometry, consumer, {smem, consumer, {}}}.run();
  }
}

}  // namespace sparse_fmha::sm90
