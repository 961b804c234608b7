// From a described problem to its outputs.
#pragma once

#include <optional>
#include <tuple>

#include "problem.h"

namespace sparse_fmha {

// Allocates out like q and lse [B, *L, Hq] fp32, and runs the kernel that the registry has for the
// problem on q's device and its current stream.
std::tuple<Tensor, Tensor> run(FmhaProblem& problem, Tensor const& q);

// The same with key tiles left out where they are below `threshold`, fp32 [B] on q's device; also
// returns int64 [B, Hq, 2]: the tiles that groups of 64 query rows visited, and those left out.
std::tuple<Tensor, Tensor, Tensor> run_skipping(FmhaProblem& problem, Tensor const& q,
                                                Tensor const& threshold);

}  // namespace sparse_fmha
