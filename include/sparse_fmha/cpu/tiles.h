// Tile shapes of the CPU kernels, chosen per problem.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::cpu {

struct Tiling {
  TileShape shape;
  int32_t query_tiles;
};

// The shape with the least time by a cost model of the kernel, on `threads` threads.
Tiling choose_tiles(FmhaProblem const& problem, int threads);

}  // namespace sparse_fmha::cpu
