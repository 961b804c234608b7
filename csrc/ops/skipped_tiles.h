// Which key tiles a call skipped, on a GPU: saved by its forward pass, read by its backward pass.
#pragma once

#include "run.h"

namespace sparse_fmha {

// What the forward pass of a problem saves for its backward pass: int32 [B, Hq, groups of 64
// queries, words], zeros, of which the kernel sets the bits of skipped tiles. The shape does not
// depend on the kernel. On the CPU, whose backward pass votes again, [B, Hq, 0, 0].
Tensor new_skipped_tiles(FmhaProblem& problem, Tensor const& q);

// Replaces attention with thresholds by attention to what its forward pass kept, which does not
// skip (device/kept_tiles.h). The problem points into `skipped`, which is replaced if it is not
// contiguous. Not for neighborhoods.
void show_kept_tiles(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& skipped,
                     Launch& launch);

// Runs the forward kernel of a neighborhood again, for the bits of the tiles that it skips. Their
// number depends on the boxes that the kernel takes, so it saves none. Returns the kernel.
KernelInfo const& skip_tiles_again(FmhaProblem& problem, Tensor const& q, Launch& launch);

}  // namespace sparse_fmha
