// Launches of kernels whose thread blocks take tiles from a counter or in turns, or have one each.
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

// Waves of tiles up to which a launch needs no counter.
struct FewWaves {
  int own = 1;    // each tile has its own thread block, which the GPU starts when a place is free
  int turns = 0;  // thread blocks take turns, as next_in_turns() has it

  // places: thread blocks that run at once.
  bool in_turns(int64_t tiles, int places) const { return tiles <= int64_t{places} * turns; }
};

// Returns the number of thread blocks to launch: as many as run at once, `places`, or one for each
// tile. Thread blocks that take several tiles overlap the end of one with the beginning of the
// next. From a counter they take the next when they begin one, which is early if there are few.
// Clears the counter on the stream if one is needed.
inline int prepare_persistent(device::Scheduler& scheduler, ExecutionContext const& context,
                              int places, FewWaves few) {
  if (few.in_turns(scheduler.num_tiles, places)) {
    return std::min(places, scheduler.num_tiles);
  }
  if (scheduler.num_tiles <= int64_t{places} * few.own) {
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
                       char const* what, FewWaves few = {}) {
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  int const places = kBlocks * multiprocessor_count();
  int const blocks = prepare_persistent(params.scheduler, context, places, few);
  kernel<<<blocks, kThreads, kSmemBytes, static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace sparse_fmha::sm90
