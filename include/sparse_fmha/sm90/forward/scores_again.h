// Recomputes the scores of a warp's 16 rows, when the warpgroup's scores are gone and its other
// warps do not need theirs again: the warp multiplies on its own. This is rare, so the code is
// short, not fast.
#pragma once

#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// q: the query tile; k: a stage of keys. Both are still in shared memory, in slices of 64 columns
// with the 128-byte swizzle. Elements are in the order of the warpgroup's accumulator.
template <class Traits, class Scores>
__device__ __forceinline__ void scores_again(typename Traits::Element const* q,
                                             typename Traits::Element const* k, int warpgroup,
                                             Scores& scores) {
  using Mma = WarpMma<typename Traits::Element>;
  auto two = [](auto const* tile, int rows, int row, int column) {
    int const place = (column / 64 * rows + row) * 64 + ((column % 64) ^ (row % 8 * 8));
    return *reinterpret_cast<uint32_t const*>(tile + place);
  };
  CUTE_UNROLL
  for (int n = 0; n < Traits::kTileK / 8; ++n) {
    float c[4] = {};
    int lane = threadIdx.x;
    asm volatile("" : "+r"(lane));  // recomputed for each n: all addresses are too many at once
    int const group = lane % 32 / 4;
    int const pair = lane % 4 * 2;
    int const query = warpgroup * 64 + lane % 128 / 32 * 16 + group;
    // Does not start at `pair`: a loop that lanes may leave one by one costs ptxas the uniform
    // registers of the whole kernel.
    CUTE_NO_UNROLL
    for (int step = 0; step < Traits::kScoreSteps; ++step) {
      int const d = step * 16 + pair;
      uint32_t a[4];
      uint32_t b[2];
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        a[r] = two(q, Traits::kTileQ, query + r % 2 * 8, d + r / 2 * 8);
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        b[r] = two(k, Traits::kTileK, n * 8 + group, d + r * 8);
      }
      Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
    }
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      scores(4 * n + r) = c[r];
    }
  }
}

}  // namespace sparse_fmha::sm90
