// Neighborhoods of kept tiles as lists of key blocks, with bitmasks: which token a row of a group
// is, which keys a tile of its walk holds and which of them a row sees. Integer arithmetic for the
// kernels of device/kept_windows.h.
//
// Keys are numbered in the order of the grid's tokens, extra tokens behind them.
#pragma once

#include <algorithm>

#include "sparse_fmha/planning/interleaved.h"

namespace sparse_fmha {

// Keys of a listed block: a word of a bitmask.
inline constexpr int32_t kWindowBlock = 32;

// 64 query rows of an interleaved grid.
struct WindowGroup {
  QueryTile tile;
  int32_t first_row;  // in the tile

  SPARSE_FMHA_HD Coord position(InterleavedGrid const& grid, int32_t row) const {
    Coord const offset = box_offset(grid.shape.q, first_row + row);
    return {tile.origin[0] + offset[0], tile.origin[1] + offset[1], tile.origin[2] + offset[2]};
  }
};

// group: among those of the grid.
SPARSE_FMHA_HD WindowGroup window_group(InterleavedGrid const& grid, int32_t group) {
  return {Neighborhood::query_tile(grid.params, grid.shape, group / 2), group % 2 * 64};
}

// The number of the token at a position of a dilation class, in the whole grid; negative if there
// is none.
SPARSE_FMHA_HD int32_t token_at(InterleavedGrid const& grid, Coord const& whole,
                                Coord const& residue, Coord const& position) {
  Coord const inner = Neighborhood::token(grid.params, residue, position);
  int32_t number = 0;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    if (position[axis] >= Neighborhood::length(grid.params, axis, residue[axis])) {
      return -1;
    }
    number = number * whole[axis] + grid.first[axis] + inner[axis] * grid.step[axis];
  }
  return number;
}

// The position of a token in its dilation class.
SPARSE_FMHA_HD Coord position_of(InterleavedGrid const& grid, Coord const& whole, int32_t token) {
  Coord position{};
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    int32_t const place = token % whole[axis];
    token /= whole[axis];
    position[axis] = (place - grid.first[axis]) / grid.step[axis] / grid.params.dilation[axis];
  }
  return position;
}

// The windows of the rows of a group; none of a row that does not exist.
SPARSE_FMHA_HD Neighborhood::Row window_of(InterleavedGrid const& grid, WindowGroup const& group,
                                           int32_t row) {
  Coord const position = group.position(grid, row);
  for (int axis = 0; axis < kGridAxes; ++axis) {
    if (position[axis] >= Neighborhood::length(grid.params, axis, group.tile.residue[axis])) {
      return {{0, 0, 0}, {0, 0, 0}};
    }
  }
  return Neighborhood::row(grid.params, group.tile.residue, position);
}

// The window that the windows of a group's rows have in common, by those of its first and last row;
// empty if a row does not exist. Edges of windows never move back.
SPARSE_FMHA_HD Neighborhood::Row common_window(Neighborhood::Row const& first,
                                               Neighborhood::Row const& last) {
  Neighborhood::Row common = {last.begin, {0, 0, 0}};
  bool const all = last.size[2] > 0;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    int32_t const size = first.begin[axis] + first.size[axis] - last.begin[axis];
    common.size[axis] = all ? max_int(size, 0) : 0;
  }
  return common;
}

// The walk of a query tile as the forward kernel visits it: the ragged tile of extra tokens, boxes,
// the other extra tokens.
struct WindowTiles {
  BoxWalk boxes;
  int32_t extra_len;
  int32_t tile_k;

  SPARSE_FMHA_HD int32_t visited() const { return boxes.num_partial + boxes.num_full; }
  SPARSE_FMHA_HD int32_t ragged() const { return extra_len % tile_k != 0; }
  SPARSE_FMHA_HD int32_t total() const { return visited() + ceil_div(extra_len, tile_k); }
  // The first extra token of the i-th tile; negative if it is a box.
  SPARSE_FMHA_HD int32_t extra(int32_t i) const {
    if (i < ragged()) {
      return extra_len / tile_k * tile_k;
    }
    return i - ragged() < visited() ? -1 : (i - ragged() - visited()) * tile_k;
  }
  SPARSE_FMHA_HD Coord box(int32_t i) const { return boxes.tile(i - ragged()); }
};

// The j-th key of the i-th tile; negative if there is none.
SPARSE_FMHA_HD int32_t key_of(InterleavedGrid const& grid, Coord const& whole,
                              WindowTiles const& tiles, Coord const& residue, int32_t i,
                              int32_t j) {
  int32_t const extra = tiles.extra(i);
  if (extra >= 0) {
    bool const there = extra + j < tiles.extra_len;
    return there ? static_cast<int32_t>(volume(whole)) + extra + j : -1;
  }
  Coord const origin = tiles.box(i);
  Coord const offset = box_offset(grid.shape.k, j);
  return token_at(grid, whole, residue,
                  {origin[0] + offset[0], origin[1] + offset[1], origin[2] + offset[2]});
}

// At least as many as the blocks that hold keys of a group of the grid.
inline int32_t most_blocks(InterleavedGrid const& grid, Coord const& whole, int32_t extra_len) {
  Coord const positions = largest_union(grid);
  int32_t const last = kGridAxes - 1;
  int64_t const apart = int64_t{grid.step[last]} * grid.params.dilation[last];
  int64_t const span = std::min<int64_t>((positions[last] - 1) * apart + 1, whole[last]);
  // A run of tokens begins and ends inside a block.
  int64_t const of_run = (span + kWindowBlock - 1) / kWindowBlock + 1;
  int64_t const runs = int64_t{positions[0]} * positions[1];
  int64_t const all = (volume(whole) + extra_len + kWindowBlock - 1) / kWindowBlock;
  int64_t const of_extra = extra_len == 0 ? 0 : ceil_div(extra_len, kWindowBlock) + 1;
  return static_cast<int32_t>(std::min(all, runs * of_run + of_extra));
}

}  // namespace sparse_fmha
