// Tile shapes for the CPU kernel, chosen for each problem.
#pragma once

#include "sparse_fmha/params.h"

namespace sparse_fmha::cpu {

// `threads` is how many query tiles should at least be there to work on.
TileShape choose_tiles(FmhaProblem const& problem, int threads);

int32_t num_query_tiles(FmhaProblem const& problem, TileShape const& shape);

}  // namespace sparse_fmha::cpu
