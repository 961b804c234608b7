// A neighborhood as Hopper's kernels with strided boxes launch it: one launch for each of the
// interleaved grids into which a large dilation splits the tokens. TMA element strides are at most
// 8, so the dilation is split into two factors: the tensor is viewed as that many interleaved grids
// (first factor), each a separate problem with the second factor as its dilation.
#pragma once

#include <vector>

#include "sparse_fmha/planning/tiling.h"

namespace sparse_fmha {

struct InterleavedGrid {
  Coord first;  // its tokens are {first + i * step} of the whole grid, per axis
  Coord step;
  Neighborhood::Params params;  // of its tokens
  TileShape shape;
  int32_t first_group;  // groups of 64 query rows of the grids before
  int32_t groups;       // 64 rows each, in the order of query tiles
};

// For a kernel with query tiles of rows_q rows and key tiles of rows_k.
std::vector<InterleavedGrid> interleaved_grids(Neighborhood::Params const& params, int32_t rows_q,
                                               int32_t rows_k, int32_t head_dim);

// At least as many as the positions per axis that lie in a window of the rows of a query tile.
Coord largest_union(InterleavedGrid const& grid);

// At least as many as the key tiles of a query tile, with tiles of extra tokens.
int32_t most_tiles(InterleavedGrid const& grid, int32_t extra_len);

}  // namespace sparse_fmha
