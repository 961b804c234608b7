// How a thread block of the kernel of all gradients computes its key tile. dQ of a step is added up
// during the next one, so all threads synchronize once a step.
#pragma once

#include "sparse_fmha/sm80/backward/fused/add_dq.h"
#include "sparse_fmha/sm80/backward/fused/halves.h"

namespace sparse_fmha::sm80 {

// dK and dV of a step, and the gradients of its scores in shared memory. Where two warps have the
// same rows, the weights pass through the same memory first.
template <class Tile, class Traits>
__device__ __forceinline__ void add_step(Tile const& tile, int i, WarpPart<Traits> const& part,
                                         typename Tile::Gradient& dk, typename Tile::Gradient& dv) {
  WarpPart<Traits> const warp(part, again(part.lane));
  auto* const exchanged = tile.smem.factor(i % 2);
  Halves<Traits> weights_t;
  Halves<Traits> dscores_t;
  {
    typename Tile::Scores weights;
    typename Tile::Scores dscores;
    StayingRows<Traits, false> const keys(tile.smem.stay(0), warp);
    StayingRows<Traits, false> const values(tile.smem.stay(1), warp);
    tile.find_weights(i, keys, values, warp, weights, dscores);
    weights_t.take(weights);
    dscores_t.take(dscores);
  }
  if constexpr (Traits::kSharing == 1) {
    dscores_t.store(exchanged, warp);
    weights_t.multiply_own(tile.douts(i), warp, dv);
    dscores_t.multiply_own(tile.queries(i), warp, dk);
  } else {
    weights_t.store(exchanged, warp);
    weights_t.multiply_own(tile.douts(i), warp, dv);
    warp.sync();
    weights_t.multiply_other(exchanged, tile.douts(i), warp, dv);
    warp.sync();  // the weights are no longer read
    dscores_t.store(exchanged, warp);
    dscores_t.multiply_own(tile.queries(i), warp, dk);
    warp.sync();
    dscores_t.multiply_other(exchanged, tile.queries(i), warp, dk);
  }
}

template <class Traits, class Geometry, class Mechanism>
__device__ __forceinline__ void run_fused(DkvBlock<Traits, Geometry, Mechanism> const& tile) {
  using Tile = DkvBlock<Traits, Geometry, Mechanism>;
  static_assert(Tile::kAhead && Traits::kHeld == Held::kNone, "keys are read for dQ, too");
  auto& smem = tile.smem;
  auto const& geometry = tile.geometry;
  auto const& work = tile.work;
  int const steps = geometry.steps(work);
  WarpPart<Traits> const warp;
  int const index = warp.rows * Traits::kSharing + warp.columns;
  // While half of the warps compute dQ, the others compute scores, so not all of them take the
  // exponential of theirs at a time. A block of four warps has another one beside it.
  bool const early = Traits::kWarps <= 4 || index < Traits::kWarps / 2;
  AddDq<Traits, Geometry, Mechanism> const add_dq(tile);
  tile.load_keys();
  if (steps > 0) {
    geometry.write_mask(work, 0);
  }
  tile.copy_first(steps);
  typename Tile::Gradient dk;
  typename Tile::Gradient dv;
  dk.clear();
  dv.clear();

  CUTE_NO_UNROLL
  for (int i = 0; i < steps; ++i) {
    tile.begin_step(i, steps);  // all gradients of the scores of the last step are there
    if (early && i > 0) {
      add_dq(i - 1);
    }
    if (geometry.needs(work, i, warp.first_row())) {
      add_step(tile, i, warp, dk, dv);
    } else {
      Halves<Traits> none;
      none.clear();
      none.store(smem.factor(i % 2), warp);
    }
    if (!early && i > 0) {
      add_dq(i - 1);
    }
  }
  __syncthreads();
  if (steps > 0) {
    add_dq(steps - 1);
  }
  __syncthreads();  // the tiles are no longer read
  tile.store(dk, dv, warp);
}

}  // namespace sparse_fmha::sm80
