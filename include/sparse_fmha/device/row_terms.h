// What the backward pass needs of each query row, found once for all of its kernels.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Launches what fills `gradients->row_terms` of a problem in fp16 or bf16. Throws
// std::runtime_error in a build without GPU kernels.
void fill_row_terms(FmhaProblem const& problem, ExecutionContext const& context);

}  // namespace sparse_fmha::device
