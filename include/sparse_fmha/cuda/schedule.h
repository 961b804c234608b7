// Host code: the order in which a kernel's thread blocks take query tiles.
#pragma once

#include <stdexcept>
#include <string>

#include "sparse_fmha/core/config.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha {

// Divides the heads into equal groups of at most `largest`.
inline device::Scheduler make_scheduler(int32_t heads, int32_t batch, int32_t tiles,
                                        int32_t largest) {
  int64_t const num_tiles = static_cast<int64_t>(tiles) * heads * batch;
  if (num_tiles > INT32_MAX / 2) {
    throw std::runtime_error("sparse_fmha: batch * heads * query tiles must be at most 2^30, got " +
                             std::to_string(num_tiles));
  }
  int32_t const instances = heads * batch;
  int32_t const groups = ceil_div(instances, largest);
  return {nullptr,   static_cast<int32_t>(num_tiles), tiles, heads,
          instances, ceil_div(instances, groups)};
}

}  // namespace sparse_fmha
