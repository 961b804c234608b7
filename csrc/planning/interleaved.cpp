#include "sparse_fmha/planning/interleaved.h"

#include <algorithm>

namespace sparse_fmha {

std::vector<InterleavedGrid> interleaved_grids(Neighborhood::Params const& params, int32_t rows_q,
                                               int32_t rows_k, int32_t head_dim) {
  Coord const inside = element_strides(params.grid, params.dilation);
  Coord step;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    step[axis] = params.dilation[axis] / inside[axis];
  }
  std::vector<InterleavedGrid> grids;
  int32_t groups = 0;
  for (int32_t i = 0; i < volume(step); ++i) {
    InterleavedGrid grid = {box_offset(step, i), step, params, {}, groups, 0};
    for (int axis = 0; axis < kGridAxes; ++axis) {
      grid.params.grid[axis] = ceil_div(params.grid[axis] - grid.first[axis], step[axis]);
      grid.params.dilation[axis] = inside[axis];
    }
    grid.shape = choose_tiles(grid.params, rows_q, rows_k, max_box(grid.params.grid, inside),
                              tile_costs(head_dim));
    grid.groups = Neighborhood::num_query_tiles(grid.params, grid.shape) * (rows_q / 64);
    groups += grid.groups;
    grids.push_back(grid);
  }
  return grids;
}

Coord largest_union(InterleavedGrid const& grid) {
  Neighborhood::Params const& p = grid.params;
  Coord positions;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    // A window moves by a stride at most where the query moves by one.
    int64_t const longest = int64_t{p.window[axis]} + p.stride[axis] + grid.shape.q[axis];
    positions[axis] =
        static_cast<int32_t>(std::min<int64_t>(longest, ceil_div(p.grid[axis], p.dilation[axis])));
  }
  return positions;
}

int32_t most_tiles(InterleavedGrid const& grid, int32_t extra_len) {
  Coord const positions = largest_union(grid);
  int32_t tiles = ceil_div(extra_len, static_cast<int32_t>(volume(grid.shape.k)));
  int32_t boxes = 1;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    boxes *= ceil_div(positions[axis], grid.shape.k[axis]);
  }
  return tiles + boxes;
}

}  // namespace sparse_fmha
