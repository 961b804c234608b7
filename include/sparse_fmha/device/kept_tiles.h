// The key tiles that a forward pass with skipping kept, as lists for the backward pass.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Key blocks of these lists: tiles of the forward kernels are a multiple of it.
inline constexpr int32_t kKeptBlock = 16;

// Replaces dense or causal attention of `problem` by block lists of its kept tiles, of `tile_k`
// keys, which do not skip. The lists are kept_blocks alone, which suffice for gradients of keys.
// Runs a kernel on the context's stream, in its memory. Throws std::runtime_error in a build
// without GPU kernels, here and below.
void show_kept_blocks(FmhaProblem& problem, int32_t tile_k, ExecutionContext const& context);

// Fills the lists of a problem that has kept_blocks.
void list_kept_blocks(FmhaProblem& problem, ExecutionContext const& context);

// Replaces block lists or stripes of `problem`, whose forward kernel has stages of `tile_k` keys,
// by lists of what each group of 64 query rows kept, which do not skip. They belong to one batch
// entry and head each, bitmasks too, and are as wide as the lists from which they are made. A block
// or run longer than a stage is listed in parts.
void show_kept_lists(FmhaProblem& problem, int32_t tile_k, ExecutionContext const& context);

}  // namespace sparse_fmha::device
