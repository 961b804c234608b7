#include "sparse_fmha/planning/choose_order.h"

#include <algorithm>

namespace sparse_fmha {
namespace {

// Keys in the union of the windows of consecutive tiles on an axis.
int64_t keys_of(Neighborhood::Params const& p, int axis, int32_t queries) {
  int32_t const moves = (queries - 1) / p.stride[axis];
  return std::min<int64_t>(p.grid[axis], p.window[axis] + int64_t{moves} * p.stride[axis]);
}

}  // namespace

TileOrder choose_order(Neighborhood::Params const& p, TileShape const& shape, int32_t blocks) {
  Coord tiles;
  bool plain = true;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    tiles[axis] = ceil_div(p.grid[axis], shape.q[axis]);
    plain &= p.dilation[axis] == 1 && p.causal[axis] == 0;
  }
  auto const total = static_cast<int32_t>(volume(tiles));
  if (!plain) {
    return {total, total};
  }
  TileOrder best{};
  int64_t fewest = 0;
  for (int slowest = 0; slowest < kGridAxes; ++slowest) {
    int64_t keys = 1;
    int32_t runs = std::max(blocks, 1);  // concurrent positions on an axis, and on all slower ones
    int32_t inner = 1;
    auto visit = [&](int axis) {
      keys *= keys_of(p, axis, std::min(runs, tiles[axis]) * shape.q[axis]);
      runs = ceil_div(runs, tiles[axis]);
    };
    for (int axis = kGridAxes - 1; axis >= 0; --axis) {
      if (axis != slowest) {
        visit(axis);
      }
      inner *= axis > slowest ? tiles[axis] : 1;
    }
    visit(slowest);
    if (slowest == 0 || keys < fewest) {
      best = {total / tiles[slowest], inner};
      fewest = keys;
    }
  }
  return best;
}

}  // namespace sparse_fmha
