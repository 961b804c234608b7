// Gradients of calls that skip key tiles, on a GPU.
#pragma once

#include "run.h"

namespace sparse_fmha {

// Replaces dense or causal attention with thresholds by attention to what its forward pass kept,
// which does not skip. Runs the forward pass once more to find it. Throws not_implemented for other
// mechanisms.
void show_kept_tiles(FmhaProblem& problem, Tensor const& q, Launch& launch);

}  // namespace sparse_fmha
