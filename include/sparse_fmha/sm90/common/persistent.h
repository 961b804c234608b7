// Launches of persistent kernels, whose thread blocks share a tile counter.
#pragma once

#include <algorithm>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/cuda/schedule.h"
#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::sm90 {

// The number of heads processed side by side: as many as keep in the L2 cache what the blocks of a
// head share, which takes `bytes`.
inline int32_t heads_in_cache(double bytes) {
  constexpr double kCacheBytes = 24e6;
  return static_cast<int32_t>(std::clamp(kCacheBytes / bytes, 1.0, 16.0));
}

// Returns the number of thread blocks to launch. Clears the counter on the stream if one is needed.
inline int prepare_persistent(device::Scheduler& scheduler, ExecutionContext const& context) {
  int const blocks = std::min(scheduler.num_tiles, multiprocessor_count());
  if (scheduler.num_tiles > blocks) {
    scheduler.next = static_cast<int32_t*>(context.memory->allocate(sizeof(int32_t)));
    check_cuda(cudaMemsetAsync(scheduler.next, 0, sizeof(int32_t),
                               static_cast<cudaStream_t>(context.stream)),
               "clearing the tile counter");
  }
  return blocks;
}

// Launches a persistent kernel. `params`, which has the scheduler, is of a type that only this
// kernel takes.
template <int kThreads, int kSmemBytes, class Params>
void launch_persistent(void (*kernel)(Params), Params& params, ExecutionContext const& context,
                       char const* what) {
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  int const blocks = prepare_persistent(params.scheduler, context);
  kernel<<<blocks, kThreads, kSmemBytes, static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace sparse_fmha::sm90
