// The key tiles of kernels that skip, by the list of all kernels: also what a build lacks.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct KernelTile {
  int32_t head_dim;
  int32_t value_dim;
  int32_t tile_k;
};

// The tile of the mechanism's kernel that skips, by the problem's head dims, or of the usual one if
// there is none.
KernelTile skip_tile(char const* mechanism, FmhaProblem const& problem);

}  // namespace sparse_fmha
