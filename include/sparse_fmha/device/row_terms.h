// Per-row terms of the backward pass, computed once for all of its kernels.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Launches the kernel that fills `gradients->row_terms` of an fp16 or bf16 problem. Throws
// std::runtime_error in a build without GPU kernels.
void fill_row_terms(FmhaProblem const& problem, ExecutionContext const& context);

}  // namespace sparse_fmha::device
