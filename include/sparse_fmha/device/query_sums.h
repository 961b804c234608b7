// fp32 sums of dQ in memory, for backward kernels that add them up.
//
// They lie as the accumulators of a warpgroup hold them, [B, heads_q, tiles of 64 queries, D / 8],
// then the numbers of eight columns in an order in which the additions of a warp are to contiguous
// bytes. A thread's four numbers are two columns of each of its two rows (device/accumulator.h).
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

inline constexpr int kSumRows = 64;  // of a tile

enum class SumOrder {
  kThreads,  // [128 threads, 4]: a thread adds its four numbers at once
  kNumbers,  // [4 warps, 4, 32 lanes]: it adds one number at a time
};

// The tiles of one head: boxes of the tokens {first + i * step} of a grid. Boxes are of one
// dilation class each. On each axis they are ordered by class, then by position; the axes are in
// row-major order. There are as many boxes for each class as for the longest.
struct SumTiles {
  Coord grid;  // all tokens
  Coord first;
  Coord step;
  Coord dilation;  // of the tokens {first + i * step}
  Coord box;
  Coord boxes;  // of a class

  int32_t count() const { return static_cast<int32_t>(volume(dilation) * volume(boxes)); }
};

inline SumTiles sum_tiles(Coord const& grid, Coord const& first, Coord const& step,
                          Coord const& dilation, Coord const& box) {
  SumTiles tiles{grid, first, step, dilation, box, {}};
  for (int axis = 0; axis < kGridAxes; ++axis) {
    int32_t const tokens = ceil_div(grid[axis] - first[axis], step[axis]);
    tiles.boxes[axis] = ceil_div(ceil_div(tokens, dilation[axis]), box[axis]);
  }
  return tiles;
}
// Of a sequence.
inline SumTiles sum_tiles(FmhaProblem const& p) {
  Coord const one = {1, 1, 1};
  return sum_tiles({1, 1, static_cast<int32_t>(volume(p.grid_q))}, {0, 0, 0}, one, one,
                   {1, 1, kSumRows});
}

// Allocates the sums of a problem and launches what clears them.
float* new_query_sums(FmhaProblem const& problem, SumTiles const& tiles,
                      ExecutionContext const& context);

// Launches the kernel that multiplies sums by the scale and rounds them to `gradients->q`, which is
// fp16 or bf16.
void round_query_sums(FmhaProblem const& problem, SumTiles const& tiles, float const* sums,
                      SumOrder order, ExecutionContext const& context);

}  // namespace sparse_fmha::device
