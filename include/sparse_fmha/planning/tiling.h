// The tile simulator: how many tiles a neighborhood visits, and which tile shapes cost the least.
//
// Counts come from Neighborhood::axis_walk, which the kernel also uses. Hassani et al.,
// "Generalized Neighborhood Attention", arXiv 2504.16922, appendix B.1, count the same tiles, those
// of the worst query tile with static key tiling.
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_fmha/mechanisms/neighborhood.h"

namespace sparse_fmha {

enum class KeyTiling {
  kDynamic,  // key tiles start at the window's edge, as in the kernel
  kStatic    // key tiles on a grid shared by all query tiles
};

// Time of one thread block alone on its multiprocessor, in microseconds.
struct TileCosts {
  double full_tile;
  double partial_tile;
  double query_tile;  // without its key tiles: loading queries, storing the output
};

// Sums over the query tiles of one head.
struct TileCount {
  int64_t query_tiles;
  int64_t visited;
  int64_t full;   // tiles of `visited` that need no mask
  int64_t worst;  // largest number of tiles that one query tile visits
};

// Query tiles of one head that visit the same numbers of key tiles.
struct TileGroup {
  int64_t query_tiles;
  int64_t visited;  // by each
  int64_t full;
};

struct RankedTiles {
  TileShape shape;
  TileCount count;
  double cost;  // microseconds of one thread block for all query tiles of one head
};

// The key tiles that a query tile visits along one axis, in the dilation class of `residue`.
Neighborhood::AxisWalk axis_tiles(Neighborhood::Params const& params, int axis, int32_t residue,
                                  TileShape const& shape, KeyTiling tiling, int32_t q_origin);

TileCount count_tiles(Neighborhood::Params const& params, TileShape const& shape,
                      KeyTiling tiling = KeyTiling::kDynamic);

// The distribution behind count_tiles(), largest numbers of visited tiles first.
std::vector<TileGroup> tile_groups(Neighborhood::Params const& params, TileShape const& shape,
                                   KeyTiling tiling = KeyTiling::kDynamic);

// Costs of the kernel row for this head dim, on an H100.
TileCosts tile_costs(int32_t head_dim);
double cost(TileCount const& count, TileCosts const& costs);

// Per axis, the factor of the dilation that TMA strides over inside a box. The other factor is the
// number of interleaved grids, each of which takes a launch where boxes have element strides.
Coord element_strides(Coord const& grid, Coord const& dilation);
// These launches: 1 if TMA strides over the whole dilation.
int64_t interleaved_launches(Coord const& grid, Coord const& dilation);
// Element strides of a call in one launch: the dilation, or 1 if boxes lie in maps of dilation
// classes (class_boxes.h).
Coord one_launch_strides(Coord const& grid, Coord const& dilation);
// The largest box that TMA supports with these strides between elements. An axis of length 1 may be
// missing from the tensor map: boxes have length 1 there, except along the last axis, which every
// map has, on a grid of a single token.
Coord max_box(Coord const& grid, Coord const& element_strides);

// All boxes of exactly `rows` tokens with sides that are powers of two, at most max_extent.
std::vector<Coord> tile_boxes(int32_t rows, Coord const& max_extent);

// All pairs of boxes, cheapest first; ties go to fewer partial tiles, then to longer runs along the
// last axis. Boxes that extend beyond the grid (the next power of two) are excluded unless there
// are no others. Throws std::runtime_error if there is no legal box.
std::vector<RankedTiles> rank_tiles(Neighborhood::Params const& params, int32_t rows_q,
                                    int32_t rows_k, Coord const& max_extent, TileCosts const& costs,
                                    KeyTiling tiling = KeyTiling::kDynamic);

// The first of rank_tiles(). Results are cached. Thread-safe.
TileShape choose_tiles(Neighborhood::Params const& params, int32_t rows_q, int32_t rows_k,
                       Coord const& max_extent, TileCosts const& costs,
                       KeyTiling tiling = KeyTiling::kDynamic);

}  // namespace sparse_fmha
