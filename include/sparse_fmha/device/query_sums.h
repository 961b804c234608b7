// fp32 sums of dQ in memory, for backward kernels that add them up.
//
// They lie as the accumulators of a warpgroup hold them, so that each addition of a warp is to 512
// contiguous bytes: [B, heads_q, tiles of 64 queries, D / 8, 128 threads, 4]. A thread's four are
// two columns of each of its two rows (device/accumulator.h).
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

inline constexpr int kSumRows = 64;  // of a tile

// Of one head.
inline int32_t num_query_tiles(FmhaProblem const& p) {
  return ceil_div(static_cast<int32_t>(volume(p.grid_q)), kSumRows);
}

// Allocates the sums of a problem and launches what clears them.
float* new_query_sums(FmhaProblem const& problem, ExecutionContext const& context);

// Launches the kernel that multiplies `gradients->q_sums` by the scale and rounds them to
// `gradients->q`, which is fp16 or bf16.
void round_query_sums(FmhaProblem const& problem, ExecutionContext const& context);

}  // namespace sparse_fmha::device
