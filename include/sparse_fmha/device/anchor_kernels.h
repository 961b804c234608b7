// GPU kernels of AnchorAttention's choice of keys, for the registry: fp16 and bf16, head dims up to
// 256.
#pragma once

#include "sparse_fmha/core/anchor.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

void anchor_means(AnchorMeans const& p, ExecutionContext const& context);
void anchor_keys(AnchorKeys const& p, ExecutionContext const& context);
void anchor_columns(AnchorColumns const& p, ExecutionContext const& context);

// Throws std::runtime_error in a build without GPU kernels.
AnchorKernels anchor_kernels();

}  // namespace sparse_fmha::device
