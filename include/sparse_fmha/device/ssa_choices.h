// The GPU kernel of SSA's choice: fp16, bf16 and fp32, head dims up to 256, groups of up to 16.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/core/ssa_choices.h"

namespace sparse_fmha::device {

// Candidates of a token are in shared memory, of which all GPUs have 99 KB.
inline constexpr int32_t kMostSsaBlocks = 512;
inline constexpr int32_t kMostSsaGroup = 16;
inline constexpr int32_t kMostSsaParts = 3;

// Throws std::runtime_error in a build without GPU kernels.
void choose_ssa_blocks(SsaChoices const& choices, ExecutionContext const& context);

}  // namespace sparse_fmha::device
