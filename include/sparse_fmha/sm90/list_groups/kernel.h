// The kernel for groups of query blocks: the role of each warp.
//
// Three consumers have a query block of 64 rows each and share a ring of 64-key stages. A key block
// that several of them see is copied once. Consumers that do not see it do not wait for it: the
// producer arrives in their place. Nothing else ties consumers to one another, so the beginning and
// the end of a query block run under the steps of the others.
#pragma once

#include "sparse_fmha/sm90/list_groups/consumer.h"
#include "sparse_fmha/sm90/list_groups/producer.h"

namespace sparse_fmha::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    list_groups_kernel(GroupParams<Traits> const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<GroupStorage<Traits>*>(raw_smem);
  if (threadIdx.x == 0) {
    smem.init();
  }
  __syncthreads();
  int const warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    GroupProducer<Traits> producer{params, smem};
    if (warp == 0) {
      producer.run_tiles();
    } else if (threadIdx.x == 32) {
      producer.run_work();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    GroupConsumer<Traits>{params, smem, warpgroup - 1}.run();
  }
}

}  // namespace sparse_fmha::sm90
