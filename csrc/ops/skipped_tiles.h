// Which key tiles a call skipped, on a GPU: saved by its forward pass, read by its backward pass.
#pragma once

#include "run.h"
#include "sparse_fmha/device/kept_windows.h"

namespace sparse_fmha {

// What the forward pass of a problem saves for its backward pass: int32 [B, Hq, groups of 64
// queries, words], zeros, of which the kernel sets the bits of skipped tiles. The shape is that of
// the row of the kernel list that skips (planning/skip_tile.h), so any build knows it. On the CPU,
// whose backward pass votes again, [B, Hq, 0, 0].
Tensor new_skipped_tiles(FmhaProblem& problem, Tensor const& q);

// Replaces attention with thresholds by attention to what its forward pass kept, which does not
// skip (device/kept_tiles.h). The problem points into `skipped`, which is replaced if it is not
// contiguous. Not for neighborhoods.
void show_kept_tiles(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& skipped,
                     Launch& launch);

// The same for neighborhoods, over copies of the tensors. The problem has gradients, with row
// terms.
device::KeptWindows kept_windows(FmhaProblem& problem, Tensor const& q,
                                 std::optional<Tensor>& skipped, Launch& launch);

}  // namespace sparse_fmha
