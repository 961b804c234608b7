// Which consumer a thread belongs to.
#pragma once

namespace sparse_fmha::sm90 {

// The calling thread's number among the consumer warpgroups, which follow the producer's. Consumers
// keep it in a uniform register; computed anew it takes none between uses.
__device__ __forceinline__ int this_consumer() { return static_cast<int>(threadIdx.x) / 128 - 1; }

}  // namespace sparse_fmha::sm90
