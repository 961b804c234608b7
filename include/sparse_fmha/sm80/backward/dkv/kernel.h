// How a thread block of the dK/dV kernel computes its key tile.
#pragma once

#include "sparse_fmha/sm80/backward/dkv/block.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Geometry, class Mechanism>
__device__ __forceinline__ void run_dkv(DkvBlock<Traits, Geometry, Mechanism> const& tile) {
  using Tile = DkvBlock<Traits, Geometry, Mechanism>;
  auto& smem = tile.smem;
  auto const& geometry = tile.geometry;
  auto const& work = tile.work;
  int const steps = geometry.steps(work);
  WarpPart<Traits> const warp;
  tile.load_keys();
  StayingRows<Traits, Traits::kHeld != Held::kNone> const keys(smem.stay(0), warp);
  StayingRows<Traits, Traits::kHeld == Held::kBoth> const values(smem.stay(1), warp);
  if (steps > 0) {
    geometry.write_mask(work, 0);
  }
  if constexpr (Traits::kHeld != Held::kNone) {
    __syncthreads();  // what is held now was where the stages are
  }
  tile.copy_first(steps);
  Factor<Traits> weights_t(smem.factor(0), warp);
  Factor<Traits> dscores_t(smem.factor(1), warp);
  typename Tile::Gradient dk;
  typename Tile::Gradient dv;
  dk.clear();
  dv.clear();

  CUTE_NO_UNROLL
  for (int i = 0; i < steps; ++i) {
    tile.begin_step(i, steps);
    bool const needed = geometry.needs(work, i, warp.first_row());
    if (needed) {
      typename Tile::Scores weights;
      typename Tile::Scores dscores;
      tile.find_weights(i, keys, values, warp, weights, dscores);
      weights_t.put(weights);
      dscores_t.put(dscores);
      warp.sync();
      multiply_columns(weights_t, tile.douts(i), warp, dv);
    }
    if constexpr (!Tile::kAhead) {
      __syncthreads();  // dO is no longer read
      if (i + 1 < steps) {
        tile.copy_douts(i + 1);
      }
      cute::cp_async_fence();
    }
    if (needed) {
      multiply_columns(dscores_t, tile.queries(i), warp, dk);
    }
  }
  __syncthreads();  // the tiles are no longer read
  tile.store(dk, dv, warp);
}

}  // namespace sparse_fmha::sm80
