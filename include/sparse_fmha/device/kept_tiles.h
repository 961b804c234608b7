// The key tiles that a forward pass with skipping kept, as lists for the backward pass.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Key blocks of these lists: tiles of the forward kernels are a multiple of it.
inline constexpr int32_t kKeptBlock = 16;

// The mechanism by lists that shows dense or causal attention of `problem` what its kept tiles, of
// `tile_k` keys, show. Fills the lists by a kernel on the context's stream, in its memory. Throws
// std::runtime_error in a build without GPU kernels.
BlockSparse::Params list_kept_tiles(FmhaProblem const& problem, int32_t tile_k,
                                    ExecutionContext const& context);

}  // namespace sparse_fmha::device
