// Neighborhoods of kept tiles as lists of key blocks, with bitmasks: which token a row of a group
// is, which keys a tile of its walk holds, and where these are among all keys. Integer arithmetic
// for the kernels of device/window_lists.h.
//
// Keys are numbered box by box, so that a block of them is a box, too: the key boxes of the forward
// kernel, now in place of each dilation class, one interleaved grid after another. Numbers of boxes
// that end a class also stand for no token. Extra tokens follow.
#pragma once

#include <algorithm>

#include "sparse_fmha/planning/interleaved.h"

namespace sparse_fmha {

// Keys of a listed block: a word of a bitmask.
inline constexpr int32_t kWindowBlock = 32;

// 64 query rows of an interleaved grid, which are a box.
struct WindowGroup {
  QueryTile tile;  // of 128 rows
  Coord origin;
  Coord sides;
};

// group: among those of the grid.
SPARSE_FMHA_HD WindowGroup window_group(InterleavedGrid const& grid, int32_t group) {
  QueryTile const tile = Neighborhood::query_tile(grid.params, grid.shape, group / 2);
  Coord const offset = box_offset(grid.shape.q, group % 2 * 64);
  int32_t const x = min_int(grid.shape.q[2], 64);
  int32_t const y = min_int(grid.shape.q[1], 64 / x);
  return {tile,
          {tile.origin[0] + offset[0], tile.origin[1] + offset[1], tile.origin[2] + offset[2]},
          {64 / x / y, y, x}};
}

// What the rows at a coordinate of an axis see; nothing if there are none.
SPARSE_FMHA_HD Interval window_at(InterleavedGrid const& grid, Coord const& residue, int axis,
                                  int32_t coordinate) {
  int32_t const length = Neighborhood::length(grid.params, axis, residue[axis]);
  return coordinate < length ? Neighborhood::window(grid.params, axis, length, coordinate)
                             : Interval{0, 0};
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

SPARSE_FMHA_HD int32_t log2_of(int32_t power_of_two) {
  int32_t log = 0;
  while (1 << log < power_of_two) {
    ++log;
  }
  return log;
}

// The key boxes with a key that some row of a query tile sees, and their keys. Extra tokens follow
// here, too.
struct KeyBoxes {
  Coord log;     // log2 of a box's sides
  Coord first;   // box of the dilation class
  Coord count;   // of boxes
  Coord end;     // of the positions that rows see
  Coord before;  // boxes of the classes before
  Coord all;     // boxes of all classes
  int32_t log_keys;
  int32_t first_block;  // of the grid, among all blocks

  SPARSE_FMHA_HD KeyBoxes(InterleavedGrid const& grid, int32_t first_key, QueryTile const& tile) {
    auto const& p = grid.params;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      int32_t const residue = tile.residue[axis];
      int32_t const length = Neighborhood::length(p, axis, residue);
      int32_t const side = grid.shape.k[axis];
      int32_t const last = min_int(tile.origin[axis] + grid.shape.q[axis], length) - 1;
      log[axis] = log2_of(side);
      first[axis] = Neighborhood::window(p, axis, length, tile.origin[axis]).begin >> log[axis];
      end[axis] = Neighborhood::window(p, axis, length, last).end;
      count[axis] = ceil_div(end[axis], side) - first[axis];
      // Classes with one more position come first.
      int32_t const longer = p.grid[axis] % p.dilation[axis];
      int32_t const boxes = ceil_div(p.grid[axis] / p.dilation[axis], side);
      int32_t const boxes_longer = ceil_div(p.grid[axis] / p.dilation[axis] + 1, side);
      before[axis] = min_int(residue, longer) * boxes_longer + max_int(residue - longer, 0) * boxes;
      all[axis] = longer * boxes_longer + (p.dilation[axis] - longer) * boxes;
    }
    log_keys = log[0] + log[1] + log[2];
    first_block = first_key / kWindowBlock;
  }

  SPARSE_FMHA_HD int32_t blocks_per_box() const { return (1 << log_keys) / kWindowBlock; }
  SPARSE_FMHA_HD int32_t blocks() const {
    return static_cast<int32_t>(volume(count)) * blocks_per_box();
  }
  // box_offset() of a key box.
  SPARSE_FMHA_HD Coord offset(int32_t i) const {
    return {i >> (log[1] + log[2]), i >> log[2] & ((1 << log[1]) - 1), i & ((1 << log[2]) - 1)};
  }
  // Of a key at a position from the first one that rows see; negative if none sees it.
  SPARSE_FMHA_HD int32_t key(Coord const& at) const {
    int32_t box = 0;
    int32_t offset = 0;
    bool seen = true;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      seen = seen && at[axis] < end[axis];
      box = box * count[axis] + (at[axis] >> log[axis]) - first[axis];
      offset = offset << log[axis] | (at[axis] & ((1 << log[axis]) - 1));
    }
    return seen ? box << log_keys | offset : -1;
  }
  SPARSE_FMHA_HD Coord position(int32_t key) const {
    Coord const box = box_offset(count, key >> log_keys);
    Coord const inside = offset(key & ((1 << log_keys) - 1));
    return {((first[0] + box[0]) << log[0]) + inside[0],
            ((first[1] + box[1]) << log[1]) + inside[1],
            ((first[2] + box[2]) << log[2]) + inside[2]};
  }
  // The number of a block among all.
  SPARSE_FMHA_HD int32_t number(int32_t block) const {
    Coord const box = box_offset(count, block / blocks_per_box());
    int32_t number = 0;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      number = number * all[axis] + before[axis] + first[axis] + box[axis];
    }
    return first_block + number * blocks_per_box() + block % blocks_per_box();
  }
};

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

// At least as many as the blocks that hold keys of a group of the grid.
inline int32_t most_blocks(InterleavedGrid const& grid, int32_t extra_len) {
  Coord const positions = largest_union(grid);
  int64_t boxes = 1;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    int32_t const side = grid.shape.k[axis];
    int32_t const of_class =
        ceil_div(ceil_div(grid.params.grid[axis], grid.params.dilation[axis]), side);
    boxes *= min_int(ceil_div(positions[axis] - 1, side) + 1, of_class);
  }
  int64_t const keys = boxes * volume(grid.shape.k) + extra_len;
  return static_cast<int32_t>((keys + kWindowBlock - 1) / kWindowBlock);
}

}  // namespace sparse_fmha
