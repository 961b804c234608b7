// Tile shapes for the CPU kernel, chosen for each problem.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::cpu {

struct Tiling {
  TileShape shape;
  int32_t query_tiles;
};

// The shape whose walks take the least time, by a cost model of the kernel, on that many threads.
Tiling choose_tiles(FmhaProblem const& problem, int threads);

}  // namespace sparse_fmha::cpu
