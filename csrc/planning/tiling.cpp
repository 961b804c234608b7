#include "sparse_fmha/planning/tiling.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace sparse_fmha {
namespace {

// Limits of TMA.
constexpr int32_t kMaxElementStride = 8;
constexpr int32_t kMaxBoxExtent = 256;  // including the elements passed over
constexpr int32_t kLongestBox = 128;    // in the kernels

using Params = Neighborhood::Params;

Neighborhood::AxisWalk axis_walk(Params const& p, int axis, int32_t len, int32_t step_q,
                                 int32_t step_k, KeyTiling tiling, int32_t q_origin) {
  if (tiling == KeyTiling::kDynamic) {
    return Neighborhood::axis_walk(p, axis, len, step_q, step_k, q_origin);
  }
  // Key tiles of one position are the keys themselves: those that some query sees and, from
  // `inner`, those that all see.
  auto const keys = Neighborhood::axis_walk(p, axis, len, step_q, 1, q_origin);
  int32_t const inner = keys.origin + keys.full_first;
  int32_t const first = keys.origin / step_k;
  int32_t const first_full = ceil_div(inner, step_k);
  return {first * step_k, ceil_div(keys.origin + keys.count, step_k) - first, first_full - first,
          (inner + keys.full) / step_k - first_full};
}

// Calls body(walk, classes) for the query tiles of one axis; `classes` dilation classes have an
// equal one.
template <class Body>
void for_each_tile(Params const& p, int axis, int32_t step_q, int32_t step_k, KeyTiling tiling,
                   Body&& body) {
  int32_t const dilation = p.dilation[axis];
  int32_t const longer = p.grid[axis] % dilation;
  for (auto const& [classes, residue] :
       {std::pair(longer, 0), std::pair(dilation - longer, longer)}) {
    int32_t const len = classes > 0 ? Neighborhood::length(p, axis, residue) : 0;
    for (int32_t origin = 0; origin < len; origin += step_q) {
      body(axis_walk(p, axis, len, step_q, step_k, tiling, origin), classes);
    }
  }
}

// The number of tiles that a query tile visits is a product over the axes. So are the sums and the
// maxima over all query tiles.
TileCount product(TileCount const& a, TileCount const& b) {
  return {a.query_tiles * b.query_tiles, a.visited * b.visited, a.full * b.full, a.worst * b.worst};
}

TileCount count_axis(Params const& p, int axis, int32_t step_q, int32_t step_k, KeyTiling tiling) {
  TileCount sum{};
  for_each_tile(p, axis, step_q, step_k, tiling,
                [&](Neighborhood::AxisWalk const& walk, int64_t classes) {
                  sum.query_tiles += classes;
                  sum.visited += classes * walk.count;
                  sum.full += classes * max_int(walk.full, 0);
                  sum.worst = std::max<int64_t>(sum.worst, walk.count);
                });
  return sum;
}

// The counts of each axis, computed on first use. Extents are powers of two.
class AxisCounts {
 public:
  AxisCounts(Params const& params, int32_t rows_q, int32_t rows_k, KeyTiling tiling)
      : params_(params), tiling_(tiling), columns_(log2_floor(rows_k) + 1) {
    for (auto& table : tables_) {
      table.resize((log2_floor(rows_q) + 1) * columns_);
    }
  }

  TileCount operator()(TileShape const& shape) {
    return product(product(at(0, shape), at(1, shape)), at(2, shape));
  }

 private:
  TileCount const& at(int axis, TileShape const& shape) {
    int32_t const q = shape.q[axis];
    int32_t const k = shape.k[axis];
    TileCount& entry = tables_[axis][log2_floor(q) * columns_ + log2_floor(k)];
    if (entry.query_tiles == 0) {
      entry = count_axis(params_, axis, q, k, tiling_);
    }
    return entry;
  }

  Params const& params_;
  KeyTiling tiling_;
  std::size_t columns_;
  std::array<std::vector<TileCount>, kGridAxes> tables_;
};

std::string to_string(Coord const& c) {
  return std::to_string(c[0]) + "x" + std::to_string(c[1]) + "x" + std::to_string(c[2]);
}

Coord at_most(Coord const& a, Coord const& b) {
  return {min_int(a[0], b[0]), min_int(a[1], b[1]), min_int(a[2], b[2])};
}

std::vector<Coord> legal_boxes(Params const& p, int32_t rows, Coord const& max_extent) {
  Coord const largest = at_most(max_extent, {rows, rows, rows});
  Coord limit = {1, 1, 1};  // initially covers the longest dilation class
  for (int axis = 0; axis < kGridAxes; ++axis) {
    while (limit[axis] < min_int(Neighborhood::length(p, axis, 0), rows)) {
      limit[axis] *= 2;
    }
  }
  for (;; limit = {2 * limit[0], 2 * limit[1], 2 * limit[2]}) {
    limit = at_most(limit, largest);
    std::vector<Coord> boxes = tile_boxes(rows, limit);
    if (!boxes.empty()) {
      return boxes;
    }
    if (limit == largest) {
      throw std::runtime_error("sparse_fmha: no box of " + std::to_string(rows) +
                               " tokens with powers of two on its sides fits in " +
                               to_string(max_extent));
    }
  }
}

bool better(RankedTiles const& a, RankedTiles const& b) {
  auto key = [](RankedTiles const& r) {
    return std::tuple(r.cost, r.count.visited - r.count.full, -r.shape.k[2], -r.shape.q[2],
                      -r.shape.k[1], -r.shape.q[1]);
  };
  return key(a) < key(b);
}

template <class Body>
void for_each_pair(Params const& p, int32_t rows_q, int32_t rows_k, Coord const& max_extent,
                   TileCosts const& costs, KeyTiling tiling, Body&& body) {
  AxisCounts counts(p, rows_q, rows_k, tiling);
  std::vector<Coord> const keys = legal_boxes(p, rows_k, max_extent);
  for (Coord const& q : legal_boxes(p, rows_q, max_extent)) {
    for (Coord const& k : keys) {
      TileCount const count = counts({q, k});
      body(RankedTiles{{q, k}, count, cost(count, costs)});
    }
  }
}

}  // namespace

Neighborhood::AxisWalk axis_tiles(Params const& params, int axis, int32_t residue,
                                  TileShape const& shape, KeyTiling tiling, int32_t q_origin) {
  return axis_walk(params, axis, Neighborhood::length(params, axis, residue), shape.q[axis],
                   shape.k[axis], tiling, q_origin);
}

TileCount count_tiles(Params const& params, TileShape const& shape, KeyTiling tiling) {
  TileCount count{1, 1, 1, 1};
  for (int axis = 0; axis < kGridAxes; ++axis) {
    count = product(count, count_axis(params, axis, shape.q[axis], shape.k[axis], tiling));
  }
  return count;
}

std::vector<TileGroup> tile_groups(Params const& params, TileShape const& shape, KeyTiling tiling) {
  using Groups = std::map<std::pair<int64_t, int64_t>, int64_t>;  // (visited, full): query tiles
  Groups groups = {{{1, 1}, 1}};
  for (int axis = 0; axis < kGridAxes; ++axis) {
    Groups on_axis;
    for_each_tile(params, axis, shape.q[axis], shape.k[axis], tiling,
                  [&](Neighborhood::AxisWalk const& walk, int64_t classes) {
                    on_axis[{walk.count, max_int(walk.full, 0)}] += classes;
                  });
    Groups both;
    for (auto const& [a, tiles_a] : groups) {
      for (auto const& [b, tiles_b] : on_axis) {
        both[{a.first * b.first, a.second * b.second}] += tiles_a * tiles_b;
      }
    }
    groups = std::move(both);
  }
  std::vector<TileGroup> result;
  for (auto it = groups.rbegin(); it != groups.rend(); ++it) {
    result.push_back({it->second, it->first.first, it->first.second});
  }
  return result;
}

TileCosts tile_costs(int32_t head_dim) {
  // Fitted to the neighborhood cases of four runs on an H100, which differ by up to 17% due to the
  // power limit: twelve cases at head dim 128, one at each other head dim, with the previous
  // ratios.
  if (head_dim <= 64) {
    return {1.26, 1.45, 1.2};
  }
  if (head_dim <= 128) {
    return {1.40, 1.68, 4.6};
  }
  return {1.49, 1.52, 3.0};
}

double cost(TileCount const& count, TileCosts const& costs) {
  return static_cast<double>(count.query_tiles) * costs.query_tile +
         static_cast<double>(count.full) * costs.full_tile +
         static_cast<double>(count.visited - count.full) * costs.partial_tile;
}

Coord element_strides(Coord const& grid, Coord const& dilation) {
  // TMA strides over at most 8 elements. On a single axis a box of 128 tokens leaves at most 2.
  Coord strides;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    bool const single = grid[axis] == volume(grid);
    strides[axis] = single ? kMaxBoxExtent / kLongestBox : kMaxElementStride;
    while (dilation[axis] % strides[axis] != 0) {
      --strides[axis];
    }
  }
  return strides;
}

int64_t interleaved_launches(Coord const& grid, Coord const& dilation) {
  Coord const inside = element_strides(grid, dilation);
  int64_t launches = 1;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    launches *= dilation[axis] / inside[axis];
  }
  return launches;
}

Coord one_launch_strides(Coord const& grid, Coord const& dilation) {
  return interleaved_launches(grid, dilation) == 1 ? dilation : Coord{1, 1, 1};
}

Coord max_box(Coord const& grid, Coord const& strides) {
  Coord largest;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    bool const last = axis + 1 == kGridAxes;
    bool const only = last && volume(grid) == 1;
    largest[axis] = grid[axis] == 1 && !only ? 1 : kMaxBoxExtent / strides[axis];
  }
  return largest;
}

std::vector<Coord> tile_boxes(int32_t rows, Coord const& max_extent) {
  std::vector<Coord> boxes;
  for (int64_t t = 1; t <= std::min(rows, max_extent[0]); t *= 2) {
    for (int64_t y = 1; t * y <= rows && y <= max_extent[1]; y *= 2) {
      for (int64_t x = 1; t * y * x <= rows && x <= max_extent[2]; x *= 2) {
        if (t * y * x == rows) {
          boxes.push_back(
              {static_cast<int32_t>(t), static_cast<int32_t>(y), static_cast<int32_t>(x)});
        }
      }
    }
  }
  return boxes;
}

std::vector<RankedTiles> rank_tiles(Params const& params, int32_t rows_q, int32_t rows_k,
                                    Coord const& max_extent, TileCosts const& costs,
                                    KeyTiling tiling) {
  std::vector<RankedTiles> ranking;
  for_each_pair(params, rows_q, rows_k, max_extent, costs, tiling,
                [&](RankedTiles const& pair) { ranking.push_back(pair); });
  std::sort(ranking.begin(), ranking.end(), better);
  return ranking;
}

TileShape choose_tiles(Params const& params, int32_t rows_q, int32_t rows_k,
                       Coord const& max_extent, TileCosts const& costs, KeyTiling tiling) {
  using Key = std::tuple<std::array<int32_t, 21>, std::array<double, 3>>;
  static constexpr std::size_t kMaxEntries = 1024;
  static std::mutex mutex;
  static auto& cache = *new std::map<Key, TileShape>;  // outlives threads that run at exit

  std::array<int32_t, 21> numbers = {rows_q, rows_k, static_cast<int32_t>(tiling)};
  int i = 3;
  for (Coord const* coord : {&params.grid, &params.window, &params.stride, &params.dilation,
                             &params.causal, &max_extent}) {
    for (int axis = 0; axis < kGridAxes; ++axis) {
      numbers[i++] = (*coord)[axis];
    }
  }
  Key const key = {numbers, {costs.full_tile, costs.partial_tile, costs.query_tile}};
  {
    std::lock_guard<std::mutex> const lock(mutex);
    if (auto const found = cache.find(key); found != cache.end()) {
      return found->second;
    }
  }
  RankedTiles best{};
  for_each_pair(params, rows_q, rows_k, max_extent, costs, tiling, [&](RankedTiles const& pair) {
    if (best.count.query_tiles == 0 || better(pair, best)) {
      best = pair;
    }
  });
  std::lock_guard<std::mutex> const lock(mutex);
  if (cache.size() >= kMaxEntries) {
    cache.clear();
  }
  cache.emplace(key, best.shape);
  return best.shape;
}

}  // namespace sparse_fmha
