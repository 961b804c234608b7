// Launches of persistent kernels, whose thread blocks share a tile counter.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::sm90 {

// Divides the heads into equal groups of at most `largest`.
inline device::Scheduler make_scheduler(int32_t heads, int32_t batch, int32_t tiles,
                                        int32_t largest) {
  int64_t const num_tiles = static_cast<int64_t>(tiles) * heads * batch;
  if (num_tiles > INT32_MAX / 2) {
    throw std::runtime_error("sparse_fmha: batch * heads * query tiles is " +
                             std::to_string(num_tiles) + ", above 2^30");
  }
  int32_t const instances = heads * batch;
  int32_t const groups = ceil_div(instances, largest);
  return {nullptr,   static_cast<int32_t>(num_tiles), tiles, heads,
          instances, ceil_div(instances, groups)};
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

}  // namespace sparse_fmha::sm90
