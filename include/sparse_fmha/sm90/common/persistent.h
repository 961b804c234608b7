// Launches of kernels whose thread blocks take tiles from a counter, or have one tile each.
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

// Returns the number of thread blocks to launch: as many as run at once, `places`, or one for each
// tile if that is at most `few_waves` times as many. Then the GPU hands out the tiles, each when a
// place is free, and needs no counter. Thread blocks that take several tiles overlap the end of one
// with the beginning of the next, but take the next when they begin one, which is early if there
// are few. Clears the counter on the stream if one is needed.
inline int prepare_persistent(device::Scheduler& scheduler, ExecutionContext const& context,
                              int places, int few_waves) {
  if (scheduler.num_tiles <= int64_t{places} * few_waves) {
    return scheduler.num_tiles;
  }
  scheduler.next = static_cast<int32_t*>(context.memory->allocate(sizeof(int32_t)));
  check_cuda(cudaMemsetAsync(scheduler.next, 0, sizeof(int32_t),
                             static_cast<cudaStream_t>(context.stream)),
             "clearing the tile counter");
  return places;
}

// Launches such a kernel. `params`, which has the scheduler, is of a type that only this kernel
// takes. kBlocks: thread blocks on a multiprocessor.
template <int kThreads, int kSmemBytes, int kBlocks = 1, class Params>
void launch_persistent(void (*kernel)(Params), Params& params, ExecutionContext const& context,
                       char const* what, int few_waves = 1) {
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  int const places = kBlocks * multiprocessor_count();
  int const blocks = prepare_persistent(params.scheduler, context, places, few_waves);
  kernel<<<blocks, kThreads, kSmemBytes, static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace sparse_fmha::sm90
