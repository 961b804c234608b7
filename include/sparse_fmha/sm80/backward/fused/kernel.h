// How a thread block of the kernel of all gradients computes its key tile. dQ of a step is added up
// during the next one, so all threads synchronize once a step. With one stage of Q it is added up
// at the step's end, while the next queries are on their way.
#pragma once

#include "sparse_fmha/sm80/backward/fused/add_dq.h"
#include "sparse_fmha/sm80/backward/fused/halves.h"
#include "sparse_fmha/sm80/backward/fused/place.h"

namespace sparse_fmha::sm80 {

// The values of a block's keys as left factor, held or not.
template <class Traits, bool kHeld = (Traits::kHeld == Held::kSecond)>
class BlockValues {
 public:
  __device__ __forceinline__ BlockValues(typename Traits::Element const* tile,
                                         WarpPart<Traits> const& /*warp*/)
      : tile_(tile) {}
  // Addresses are computed after this.
  template <class Part>
  __device__ __forceinline__ StayingRows<Part, false> of(WarpPart<Part> const& warp) const {
    return {tile_, warp};
  }

 private:
  typename Traits::Element const* tile_;
};
template <class Traits>
class BlockValues<Traits, true> : public StayingRows<Traits, true> {
 public:
  using StayingRows<Traits, true>::StayingRows;
  template <class Part>
  __device__ __forceinline__ StayingRows<Traits, true> const& of(
      WarpPart<Part> const& /*warp*/) const {
    return *this;
  }
};

// dK and dV of a step, and the gradients of its scores in shared memory. The weights that two
// warps with the same rows exchange pass through the same memory first. dO is not read after
// `release`.
template <class Tile, class Traits, class Release>
__device__ __forceinline__ void add_step(Tile const& tile, int i, BlockValues<Traits> const& values,
                                         WarpPart<Traits> const& part, typename Tile::Gradient& dk,
                                         typename Tile::Gradient& dv, Release const& release) {
  WarpPart<Traits> const warp(part, again(part.lane));
  auto* const exchanged = tile.smem.factor(i % Traits::kFactorTiles);
  Halves<Traits> weights_t;
  Halves<Traits> dscores_t;
  // Weights and gradients of 32 x 32 scores take 64 registers, beside the sums; of more they do not
  // fit.
  constexpr int kParts = Traits::kBlocks * Traits::kWarpColumns > 64 ? 2 : 1;
  using Part = PartTraits<Traits, kParts>;
  CUTE_UNROLL
  for (int part = 0; part < kParts; ++part) {
    Sums<Part::kBlocks, Part::kWarpColumns> weights;
    Sums<Part::kBlocks, Part::kWarpColumns> dscores;
    WarpPart<Part> const columns(again(warp.lane), warp.rows, warp.columns * kParts + part);
    StayingRows<Part, false> const keys(tile.smem.stay(0), columns);
    tile.find_weights(i, keys, values.of(columns), columns, weights, dscores);
    weights_t.take(weights, part);
    dscores_t.take(dscores, part);
  }
  weights_t.store(exchanged, warp);
  weights_t.multiply_own(tile.douts(i), warp, dv);
  warp.sync();
  weights_t.multiply_other(exchanged, tile.douts(i), warp, dv);
  warp.sync();  // the weights are no longer read
  release();
  dscores_t.store(exchanged, warp);
  dscores_t.multiply_own(tile.queries(i), warp, dk);
  warp.sync();
  dscores_t.multiply_other(exchanged, tile.queries(i), warp, dk);
}

template <class Traits, class Geometry, class Mechanism>
__device__ __forceinline__ void run_fused(DkvBlock<Traits, Geometry, Mechanism> const& block) {
  using Tile = DkvBlock<Traits, Geometry, Mechanism>;
  using Work = typename Tile::Work;
  static_assert(Traits::kHeld == Held::kNone || Traits::kHeld == Held::kSecond,
                "keys are read for dQ, too");
  auto& smem = block.smem;
  auto const& geometry = block.geometry;
  PlaceOf<Traits, Work> const place(block.work, smem.work);
  block.copy_keys();
  __syncthreads();  // steps are placed, and the work is copied
  Work const& work = place.work();
  Tile const tile{block.params, smem, geometry, work};
  int const steps = geometry.steps(work);
  // While half of the warps compute dQ, the others compute scores, so not all of them take the
  // exponential of theirs at a time. A block of four warps has another one beside it.
  auto const early = [&] { return Traits::kWarps <= 4 || place.in_first_half(); };
  AddDq<Traits, Geometry, Mechanism> const add_dq(tile);
  if constexpr (Traits::kHeld == Held::kSecond) {
    cute::cp_async_wait<0>();
    __syncthreads();
  }
  BlockValues<Traits> const values(smem.stay(1), place.warp());
  if constexpr (Traits::kHeld == Held::kSecond) {
    __syncthreads();  // they were where the stages are
  }
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
    if (Tile::kFirstAhead && i > 0 && early()) {
      add_dq(i - 1);
    }
    auto const release = [&] {
      if constexpr (!Tile::kAhead) {
        __syncthreads();
        if (i + 1 < steps) {
          tile.copy_douts(i + 1);
        }
        cute::cp_async_fence();
      }
    };
    WarpPart<Traits> const warp = place.warp();
    if (geometry.needs(work, i, warp.first_row())) {
      add_step(tile, i, values, warp, dk, dv, release);
    } else {
      release();
      Halves<Traits> none;
      none.clear();
      none.store(smem.factor(i % Traits::kFactorTiles), warp);
    }
    if constexpr (!Tile::kFirstAhead) {
      __syncthreads();  // Q is no longer read, and all gradients of the scores are there
      if (i + 1 < steps) {
        tile.copy_queries(i + 1);
      }
      cute::cp_async_fence();
      add_dq(i);
    } else if (i > 0 && !early()) {
      add_dq(i - 1);
    }
  }
  cute::cp_async_wait<0>();  // without steps nothing has waited for the keys
  __syncthreads();
  if (Tile::kFirstAhead && steps > 0) {
    add_dq(steps - 1);
  }
  __syncthreads();  // the tiles are no longer read
  tile.store(dk, dv, place.warp());
}

}  // namespace sparse_fmha::sm80
