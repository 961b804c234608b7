#include "sparse_fmha/cpu/tiles.h"

#include <cmath>

#include "sparse_fmha/cpu/groups.h"
#include "sparse_fmha/planning/skip_tile.h"
#include "sparse_fmha/planning/tiling.h"

namespace sparse_fmha::cpu {
namespace {

// More queries make keys no cheaper, and more keys do not fit in the L1 cache.
constexpr int64_t kMaxQueries = 256;
constexpr int64_t kMaxKeys = 64;

// Cycles of one query tile on a core with two 16-lane multipliers, fitted to measured times of 2-D
// and 3-D neighborhoods within 15 percent.
double tile_cycles(FmhaProblem const& problem, double queries, double keys) {
  double const dims = 0.5 * (problem.head_dim + problem.value_dim);
  double const per_score = dims + 10;  // 16 queries with a key: products and softmax
  double const per_key = 1.5 * dims;   // loading it
  double const per_query = 800;        // loading and transposing it, storing its output
  return keys * (std::ceil(queries / 16) * per_score + per_key) + queries * per_query;
}

Coord positions(Dense::Params const& p) { return {1, 1, p.len_q}; }
Coord positions(Causal::Params const& p) { return {1, 1, p.len_q}; }
Coord positions(Neighborhood::Params const& p) {
  return {p.grid[0] / p.dilation[0], p.grid[1] / p.dilation[1], p.grid[2] / p.dilation[2]};
}

// The query tile in the middle represents all of them.
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
    // Divides the union of the windows into equal parts, so that few keys lie outside. The fastest
    // axis is divided last, because long runs of keys are cheap to load.
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

// The best of all boxes of queries with sides that are powers of two.
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
                              tile_cycles(problem, queries, keys + problem.extra_len);
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

// Splits groups that have more rows than the best tile.
Tiling tiles_of_stripes(Stripe::Params const& p) {
  int32_t rows = static_cast<int32_t>(kMaxQueries);
  while (p.block_q % rows != 0) {
    rows -= 64;
  }
  TileShape const shape{{1, 1, rows}, {1, 1, int32_t{kMaxKeys}}};
  return {shape, Stripe::num_query_tiles(p, shape)};
}

// The shapes that groups.h takes for each mechanism.
template <class M>
Tiling groups(FmhaProblem const& problem, typename M::Params const& params) {
  auto const [head_dim, value_dim, tile_k] = skip_tile(M::kName, problem);
  (void)value_dim;
  TileShape shape{{1, 1, kGroupRows}, {1, 1, tile_k}};
  if constexpr (std::is_same_v<M, Neighborhood>) {
    // Like planning/interleaved.h for the first interleaved grid.
    Neighborhood::Params first = params;
    Coord const inside = element_strides(params.grid, params.dilation);
    for (int axis = 0; axis < kGridAxes; ++axis) {
      int32_t const step = params.dilation[axis] / inside[axis];
      first.grid[axis] = ceil_div(params.grid[axis], step);
      first.dilation[axis] = inside[axis];
    }
    shape = sparse_fmha::choose_tiles(first, 2 * kGroupRows, tile_k, max_box(first.grid, inside),
                                      tile_costs(head_dim));
  } else if constexpr (std::is_same_v<M, BlockSparse>) {
    int32_t const box = min_int(params.block_kv, tile_k);
    shape.k = {1, tile_k / box, box};
  }
  return {shape, Group<M>::count(params, shape)};
}

// The best tiles if nothing is skipped.
template <class M>
Tiling plain_tiles(FmhaProblem const& problem, typename M::Params const& params, int threads) {
  if constexpr (std::is_same_v<M, BlockSparse>) {
    return tiles_of_blocks(params);
  } else if constexpr (std::is_same_v<M, Stripe>) {
    return tiles_of_stripes(params);
  } else {
    return choose<M>(problem, params, threads);
  }
}

template <class M>
Tiling tiles_of(FmhaProblem const& problem, int threads) {
  auto const& params = std::get<mechanism_index<M>()>(problem.sparsity);
  return problem.skip_threshold != nullptr ? groups<M>(problem, params)
                                           : plain_tiles<M>(problem, params, threads);
}

template <class... M>
Tiling tiles_among(MechanismList<M...>, FmhaProblem const& problem, int threads) {
  constexpr Tiling (*kTilesOf[])(FmhaProblem const&, int) = {tiles_of<M>...};
  return kTilesOf[problem.sparsity.index()](problem, threads);
}

}  // namespace

Tiling choose_tiles(FmhaProblem const& problem, int threads) {
  return tiles_among(Mechanisms{}, problem, threads);
}

}  // namespace sparse_fmha::cpu
