// The GPU kernel of HiP's search: fp16, bf16 and fp32, head dims up to 256.
#pragma once

#include "sparse_fmha/core/hip_search.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Scores and chunks are in shared memory, 16 bytes for each chunk, and queries, up to 16 KB. All
// GPUs have 99 KB of it.
inline constexpr int32_t kMostHipChunks = 4096;

// Throws std::runtime_error in a build without GPU kernels.
void find_hip_keys(HipSearch const& search, ExecutionContext const& context);

}  // namespace sparse_fmha::device
