// Generalized neighborhood attention on grids of one to three axes.
//
// Every quantity is a product over the axes, so each axis is computed separately and the boxes are
// combined at the end. The edges of a window never move back from one query to the next, so on each
// axis the windows of a query tile have an interval as union and as intersection: key tiles cover
// the union, and those inside the intersection are full.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha {

// A box of tiles. Those in an inner box (`full_first`, `full`) need no mask. The others are visited
// first: the slabs outside it along axis 0, then axis 1, then axis 2.
struct BoxWalk {
  int32_t num_partial;
  int32_t num_full;
  Coord origin;  // position of tile (0, 0, 0)
  Coord step;    // extents of a tile
  Coord count;   // tiles per axis
  Coord full_first;
  Coord full;  // full tiles per axis; all three are 0 if there are none

  SPARSE_FMHA_HD Coord tile(int32_t i) const {
    // No arrays indexed by run-time values, because GPUs place these in slow local memory.
    int32_t const slab0 = (count[0] - full[0]) * count[1] * count[2];
    int32_t const slab1 = full[0] * (count[1] - full[1]) * count[2];
    int32_t const slab2 = full[0] * full[1] * (count[2] - full[2]);
    int32_t const slab = (i >= slab0) + (i >= slab0 + slab1) + (i >= slab0 + slab1 + slab2);
    i -= (slab > 0 ? slab0 : 0) + (slab > 1 ? slab1 : 0) + (slab > 2 ? slab2 : 0);
    Coord const extent = {0,
                          slab == 0   ? count[1]
                          : slab == 1 ? count[1] - full[1]
                                      : full[1],
                          slab < 2    ? count[2]
                          : slab == 2 ? count[2] - full[2]
                                      : full[2]};
    Coord const place = box_offset(extent, i);
    auto position = [&](int axis) {
      int32_t const skipped = axis < slab                                       ? full_first[axis]
                              : axis == slab && place[axis] >= full_first[axis] ? full[axis]
                                                                                : 0;
      return origin[axis] + (place[axis] + skipped) * step[axis];
    };
    return {position(0), position(1), position(2)};
  }
};

struct Neighborhood {
  static constexpr char const* kName = "neighborhood";
  static constexpr bool kOnGrid = true;
  static constexpr bool kByLists = false;

  // Axes missing from the user's grid have length 1, window 1, stride 1, dilation 1, not causal.
  struct Params {
    Coord grid;
    Coord window;
    Coord stride;
    Coord dilation;
    Coord causal;  // 0 or 1 per axis
  };

  struct Row {
    Coord begin;  // of the window
    Coord size;
    // The same row when key positions are counted from `origin`.
    SPARSE_FMHA_HD Row relative_to(Coord const& origin) const {
      return {{begin[0] - origin[0], begin[1] - origin[1], begin[2] - origin[2]}, size};
    }
  };

  // Number of positions in a dilation class of one axis.
  static SPARSE_FMHA_HD int32_t length(Params const& p, int axis, int32_t residue) {
    int32_t const d = p.dilation[axis];
    return p.grid[axis] / d + (residue < p.grid[axis] % d);
  }

  // Keys that query position q sees on one axis whose class has `len` positions.
  static SPARSE_FMHA_HD Interval window(Params const& p, int axis, int32_t len, int32_t q) {
    int32_t const w = p.window[axis];
    int32_t const s = p.stride[axis];
    int32_t const group = q / s * s;
    if (p.causal[axis]) {
      int32_t const leader = min_int(group + s - 1, len - 1);
      return {max_int(leader - w + 1, 0), q + 1};
    }
    int32_t const leader = min_int(group + s / 2, len - 1);
    int32_t const begin = min_int(max_int(leader - w / 2, 0), len - w);
    return {begin, begin + w};
  }

  // The inverse: queries that see key position k.
  static SPARSE_FMHA_HD Interval queries(Params const& p, int axis, int32_t len, int32_t k) {
    int32_t const w = p.window[axis];
    int32_t const s = p.stride[axis];
    if (p.causal[axis]) {
      return {k, min_int(s * ((k + w) / s + (k + w >= len)), len)};
    }
    int32_t const left = w / 2;
    int32_t const right = w - 1 - left;
    int32_t const shift = s - s / 2 - 1;
    return {k < w ? 0 : (k - right + shift) / s * s,
            k >= len - w ? len : (k + left + shift + 1) / s * s};
  }

  static SPARSE_FMHA_HD Row row(Params const& p, Coord const& residue, Coord const& q) {
    Row r{};
    for (int axis = 0; axis < kGridAxes; ++axis) {
      Interval const w = window(p, axis, length(p, axis, residue[axis]), q[axis]);
      r.begin[axis] = w.begin;
      r.size[axis] = w.end - w.begin;
    }
    return r;
  }
  // Unsigned, so that a key before the window is out of range just like one after it.
  static SPARSE_FMHA_HD bool visible(Params const& /*p*/, Row const& r, Coord const& k) {
    return (static_cast<uint32_t>(k[0] - r.begin[0]) < static_cast<uint32_t>(r.size[0])) &
           (static_cast<uint32_t>(k[1] - r.begin[1]) < static_cast<uint32_t>(r.size[1])) &
           (static_cast<uint32_t>(k[2] - r.begin[2]) < static_cast<uint32_t>(r.size[2]));
  }
  static SPARSE_FMHA_HD Coord token(Params const& p, Coord const& residue, Coord const& pos) {
    Coord token{};
    for (int axis = 0; axis < kGridAxes; ++axis) {
      token[axis] = pos[axis] * p.dilation[axis] + residue[axis];
    }
    return token;
  }

  static SPARSE_FMHA_HD int32_t num_query_tiles(Params const& p, TileShape const& t) {
    return num_boxes(p, t.q);
  }
  static SPARSE_FMHA_HD QueryTile query_tile(Params const& p, TileShape const& t, int32_t i) {
    return box<QueryTile>(p, t.q, i);
  }
  static SPARSE_FMHA_HD int32_t num_key_tiles(Params const& p, TileShape const& t) {
    return num_boxes(p, t.k);
  }
  static SPARSE_FMHA_HD KeyTile key_tile(Params const& p, TileShape const& t, int32_t i) {
    return box<KeyTile>(p, t.k, i);
  }

  // One axis of a walk. The full tiles of a box are those that are full on every axis; `full` is
  // zero or less if this axis has none.
  struct AxisWalk {
    int32_t origin;  // position of the first key tile
    int32_t count;
    int32_t full_first;
    int32_t full;
  };

  // Key tiles start exactly at the window's edge, wherever that is.
  static SPARSE_FMHA_HD AxisWalk axis_walk(Params const& p, int axis, int32_t len, int32_t step_q,
                                           int32_t step_k, int32_t q_origin) {
    Interval const first = window(p, axis, len, q_origin);
    Interval const last = window(p, axis, len, min_int(q_origin + step_q, len) - 1);
    int32_t const full_first = ceil_div(last.begin - first.begin, step_k);
    return {first.begin, ceil_div(last.end - first.begin, step_k), full_first,
            (first.end - first.begin) / step_k - full_first};
  }

  static SPARSE_FMHA_HD BoxWalk walk(Params const& p, TileShape const& t, QueryTile const& q) {
    BoxWalk walk{};
    walk.step = t.k;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      AxisWalk const a = axis_walk(p, axis, length(p, axis, q.residue[axis]), t.q[axis], t.k[axis],
                                   q.origin[axis]);
      walk.origin[axis] = a.origin;
      walk.count[axis] = a.count;
      walk.full_first[axis] = a.full_first;
      walk.full[axis] = a.full;
    }
    return counted(walk);
  }

  // Query tiles of the tiling above with a query that sees a key of this tile. A key tile clipped
  // by the border has keys out of range, so it has no full query tile.
  static SPARSE_FMHA_HD BoxWalk walk_transposed(Params const& p, TileShape const& t,
                                                KeyTile const& k) {
    BoxWalk walk{};
    walk.step = t.q;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      int32_t const len = length(p, axis, k.residue[axis]);
      int32_t const step = t.q[axis];
      int32_t const end = k.origin[axis] + t.k[axis];
      Interval const first = queries(p, axis, len, k.origin[axis]);
      Interval const last = queries(p, axis, len, min_int(end, len) - 1);
      int32_t const begin_tile = first.begin / step;
      walk.origin[axis] = begin_tile * step;
      walk.count[axis] = ceil_div(last.end, step) - begin_tile;
      walk.full_first[axis] = ceil_div(last.begin, step) - begin_tile;
      // The last query tile may be clipped: only its in-range queries count.
      int32_t const full_end = first.end == len ? ceil_div(len, step) : first.end / step;
      walk.full[axis] = end > len ? 0 : full_end - begin_tile - walk.full_first[axis];
    }
    return counted(walk);
  }

 private:
  // Boxes of one axis' two kinds of dilation classes. The longer classes come first.
  struct Classes {
    int32_t longer;        // number of classes with one more position
    int32_t boxes_longer;  // boxes per longer class
    int32_t boxes;         // boxes per other class
    int32_t total;
  };
  static SPARSE_FMHA_HD Classes classes(Params const& p, int axis, int32_t extent) {
    int32_t const d = p.dilation[axis];
    int32_t const len = p.grid[axis] / d;
    Classes c{p.grid[axis] % d, ceil_div(len + 1, extent), ceil_div(len, extent), 0};
    c.total = c.longer * c.boxes_longer + (d - c.longer) * c.boxes;
    return c;
  }

  static SPARSE_FMHA_HD int32_t num_boxes(Params const& p, Coord const& extent) {
    return classes(p, 0, extent[0]).total * classes(p, 1, extent[1]).total *
           classes(p, 2, extent[2]).total;
  }

  template <class Tile>
  static SPARSE_FMHA_HD Tile box(Params const& p, Coord const& extent, int32_t i) {
    Tile tile{};
    for (int axis = kGridAxes - 1; axis >= 0; --axis) {
      Classes const c = classes(p, axis, extent[axis]);
      int32_t j = i % c.total;
      i /= c.total;
      int32_t const in_longer = c.longer * c.boxes_longer;
      bool const longer = j < in_longer;
      j -= longer ? 0 : in_longer;
      int32_t const boxes = longer ? c.boxes_longer : c.boxes;
      tile.residue[axis] = j / boxes + (longer ? 0 : c.longer);
      tile.origin[axis] = j % boxes * extent[axis];
    }
    return tile;
  }

  // Fills in the totals of a walk from its axes; a full tile is full on every axis.
  static SPARSE_FMHA_HD BoxWalk counted(BoxWalk walk) {
    if (walk.full[0] <= 0 || walk.full[1] <= 0 || walk.full[2] <= 0) {
      walk.full = {0, 0, 0};
      walk.full_first = {0, 0, 0};
    }
    walk.num_full = static_cast<int32_t>(volume(walk.full));
    walk.num_partial = static_cast<int32_t>(volume(walk.count)) - walk.num_full;
    return walk;
  }
};

}  // namespace sparse_fmha
