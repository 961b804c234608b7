#include "sparse_fmha/cpu/tiles.h"

#include <cmath>

namespace sparse_fmha::cpu {
namespace {

// More queries make keys no cheaper, and more keys do not stay in the first-level cache.
constexpr int64_t kMaxQueries = 256;
constexpr int64_t kMaxKeys = 64;

// Cycles of one query tile on a core with two 16-lane multipliers, fitted to measured times of 2-D
// and 3-D neighborhoods within 15 percent.
double tile_cycles(double head_dim, double queries, double keys) {
  double const per_score = head_dim + 10;  // of 16 queries with a key: products and softmax
  double const per_key = 1.5 * head_dim;   // fetching it
  double const per_query = 800;            // fetching and transposing it, storing its output
  return keys * (std::ceil(queries / 16) * per_score + per_key) + queries * per_query;
}

Coord positions(Dense::Params const& p) { return {1, 1, p.len_q}; }
Coord positions(Causal::Params const& p) { return {1, 1, p.len_q}; }
Coord positions(Neighborhood::Params const& p) {
  return {p.grid[0] / p.dilation[0], p.grid[1] / p.dilation[1], p.grid[2] / p.dilation[2]};
}

// The query tile in the middle stands for all of them.
template <class Params>
QueryTile middle_tile(Params const& params, Coord const& q) {
  Coord const all = positions(params);
  return {{0, 0, 0},
          {all[0] / 2 / q[0] * q[0], all[1] / 2 / q[1] * q[1], all[2] / 2 / q[2] * q[2]}};
}

template <class M>
TileShape with_keys(typename M::Params const& params, Coord const& q) {
  TileShape shape{q, {1, 1, kMaxKeys}};
  if constexpr (std::is_same_v<M, Neighborhood>) {
    // The union of the windows in equal parts, so that little of them lies outside; the fastest
    // axis is cut last, because long runs of keys are cheap to fetch.
    Coord const all = M::walk(params, {q, {1, 1, 1}}, middle_tile(params, q)).count;
    shape.k = all;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      for (int32_t parts = 2; volume(shape.k) > kMaxKeys && shape.k[axis] > 1; ++parts) {
        shape.k[axis] = ceil_div(all[axis], parts);
      }
    }
  }
  return shape;
}

// The best of all boxes of queries with powers of two on the sides.
template <class M>
Tiling choose(FmhaProblem const& problem, typename M::Params const& params, int threads) {
  double const heads = static_cast<double>(problem.batch) * problem.heads_q;
  Coord const& grid = problem.grid_q;
  Tiling best{};
  double best_cycles = INFINITY;
  Coord q;
  for (q[0] = 1; q[0] < 2 * grid[0] && volume({q[0], 1, 1}) <= kMaxQueries; q[0] *= 2) {
    for (q[1] = 1; q[1] < 2 * grid[1] && volume({q[0], q[1], 1}) <= kMaxQueries; q[1] *= 2) {
      for (q[2] = 1; q[2] < 2 * grid[2] && volume(q) <= kMaxQueries; q[2] *= 2) {
        TileShape const shape = with_keys<M>(params, q);
        int32_t const tiles = M::num_query_tiles(params, shape);
        auto const walk = M::walk(params, shape, middle_tile(params, q));
        double const keys = static_cast<double>(walk.num_partial + walk.num_full) * volume(shape.k);
        double const queries = static_cast<double>(volume(grid)) / tiles;
        double const cycles = std::ceil(heads * tiles / threads) *
                              tile_cycles(problem.head_dim, queries, keys + problem.extra_len);
        if (cycles < best_cycles) {
          best = {shape, tiles};
          best_cycles = cycles;
        }
      }
    }
  }
  return best;
}

Tiling tiles_of_blocks(BlockSparse::Params const& p) {
  TileShape const shape{{1, 1, p.block_q}, {1, 1, min_int(p.block_kv, int32_t{kMaxKeys})}};
  return {shape, BlockSparse::num_query_tiles(p, shape)};
}

// Groups are cut where they have more rows than a tile is best at.
Tiling tiles_of_stripes(Stripe::Params const& p) {
  int32_t rows = static_cast<int32_t>(kMaxQueries);
  while (p.block_q % rows != 0) {
    rows -= 64;
  }
  TileShape const shape{{1, 1, rows}, {1, 1, int32_t{kMaxKeys}}};
  return {shape, Stripe::num_query_tiles(p, shape)};
}

}  // namespace

Tiling choose_tiles(FmhaProblem const& problem, int threads) {
  switch (problem.sparsity.index()) {
    case 0:
      return choose<Dense>(problem, std::get<0>(problem.sparsity), threads);
    case 1:
      return choose<Causal>(problem, std::get<1>(problem.sparsity), threads);
    case 2:
      return choose<Neighborhood>(problem, std::get<2>(problem.sparsity), threads);
    case 3:
      return tiles_of_blocks(std::get<3>(problem.sparsity));
    default:
      return tiles_of_stripes(std::get<4>(problem.sparsity));
  }
}

}  // namespace sparse_fmha::cpu
