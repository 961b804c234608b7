// Small kernels in which a warp computes a row.
#pragma once

#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {

inline constexpr int kRowThreads = 256;
inline constexpr int kWarp = 32;
inline constexpr int kRowWarps = kRowThreads / kWarp;
inline constexpr uint32_t kAllLanes = 0xffffffff;

// Thread blocks for `rows` rows.
inline unsigned row_blocks(int64_t rows, char const* of_what) {
  return grid_size((rows + kRowWarps - 1) / kRowWarps, of_what);
}
__device__ __forceinline__ int64_t row_of_warp() {
  return int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
}

}  // namespace sparse_fmha::device
