// From a described problem to its outputs.
#pragma once

#include <tuple>

#include "problem.h"

namespace sparse_fmha {

// Allocates out like q and lse [B, *L, Hq] fp32, and runs the kernel that the registry has for the
// problem on q's device and its current stream.
std::tuple<Tensor, Tensor> run(FmhaProblem& problem, Tensor const& q);

}  // namespace sparse_fmha
