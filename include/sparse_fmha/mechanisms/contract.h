// The interface of a sparsity mechanism.
//
// A mechanism is a type with only static members: integer arithmetic that runs on host and device.
// Kernels are written against this interface, so a mechanism can be added without changing them,
// and the host tests can verify it without a GPU.
//
//   struct Params;                       plain data, passed to kernels by value
//   static constexpr char const* kName;
//   num_query_tiles(Params, TileShape)            how many query tiles cover the problem
//   query_tile(Params, TileShape, index)          the index-th query tile
//   walk(Params, TileShape, QueryTile)            the key tiles that this query tile visits
//   num_key_tiles(Params, TileShape)
//   key_tile(Params, TileShape, index)            a tiling of the keys, for the backward pass
//   walk_transposed(Params, TileShape, KeyTile)   the query tiles that visit this key tile
//   row(Params, residue, q)                       what `visible` needs to know of one query
//   visible(Params, Row, k)                       whether that query sees key position k
//
// The Hopper kernel also needs kOnGrid. If it is false, tiles are contiguous tokens, with
//
//   Row::relative_to(origin)                      the row when keys are counted from `origin`
//   kPartsAreSuffixes                             whether some rows of a query tile visit only the
//                                                 last key tiles of the whole tile's walk; walk()
//                                                 is then also called for parts beyond the last
//                                                 query, and returns no tiles
//
// If it is true, tiles are boxes, and so is what a query sees, with
//
//   length(Params, axis, residue)                 positions of a class on one axis
//   window(Params, axis, length, q)               the interval that position q sees there; q may be
//                                                 after the last position
//
// kByLists: the parameters point to lists that may differ by batch entry and head. A mechanism by
// lists has no walk_transposed and no key tiling, but has
//
//   for_head(Params, batch, head)                 the parameters of one of them, for the above
//   key_position(position, token)                 the position of a key for visible()
//   Walk::is_cut(tile)                            whether a full tile still needs a mask
//
// Positions. A mechanism with dilation splits the grid into residue classes that never see each
// other. `residue` names the class; positions q and k count inside it. Token = position * dilation
// + residue, which `token(Params, residue, position)` computes. Without dilation, residue is 0 and
// positions are token coordinates.
//
// Promises, which the tests check for every mechanism:
//   1. query tiles are disjoint and cover every query;
//   2. every visible (query, key) pair lies in exactly one tile of the query tile's walk;
//   3. in a full tile every in-range query of the tile sees every key, and all keys are in range;
//   4. walk_transposed visits query tiles of the tiling above, covers every visible pair exactly
//      once, and makes the same promise for its full tiles.
// A walk may visit a tile in which nothing is visible; it costs time, not correctness.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha {

// Extents of the tiles in tokens per axis, as run-time values. volume(q) and volume(k) are the rows
// and columns of the matrix tile. A box clipped by the border keeps its row numbering.
struct TileShape {
  Coord q;
  Coord k;
};

// Positions [begin, end) on one axis.
struct Interval {
  int32_t begin;
  int32_t end;
};

struct QueryTile {
  Coord residue;  // dilation class
  Coord origin;   // position of the first row
};

struct KeyTile {
  Coord residue;
  Coord origin;
};

// Offset of row r from the box's origin; rows are in row-major order.
SPARSE_FMHA_HD Coord box_offset(Coord const& extent, int32_t r) {
  return {r / (extent[1] * extent[2]), (r / extent[2]) % extent[1], r % extent[2]};
}

// Fails to compile, with the missing name in the message, if M is not a mechanism.
template <class M>
constexpr bool is_mechanism() {
  using Params = typename M::Params;
  using Row = typename M::Row;
  constexpr Params const* p = nullptr;
  (void)p;
  using Walk = decltype(M::walk(Params{}, TileShape{}, QueryTile{}));
  static_assert(sizeof(Row) > 0,
                "a mechanism has a Row: what visible() needs to know of one query");
  static_assert(sizeof(decltype(Walk::num_partial)) && sizeof(decltype(Walk::num_full)),
                "a walk says how many of its key tiles need an element mask and how many do not");
  static_assert(sizeof(decltype(Walk{}.tile(0))) == sizeof(Coord),
                "a walk names the origin of its i-th key tile, the partial ones first");
  return true;
}

}  // namespace sparse_fmha
