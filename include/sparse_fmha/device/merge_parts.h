// The merge of attention over parts of the keys, for the registry.
#pragma once

#include "sparse_fmha/core/merge.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// fp16, bf16 and fp32. Throws std::runtime_error in a build without GPU kernels.
void merge_parts(MergeProblem const& problem, ExecutionContext const& context);

}  // namespace sparse_fmha::device
