// A consumer warpgroup of dQ: 64 query rows against every key tile of the walk.
//
// S = Q K^T, P = exp2(log2(e) * (scale * S + bias) - lse), dP = dO V^T, dS = P * (dP - delta). dQ
// is the scale times the sum of dS K over the tiles. A masked element of dS is zero.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/backward/dq/accumulation.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct DqConsumer {
  KernelParams<Geometry, Mechanism> const& params;
  SharedStorage<Traits, Geometry>& smem;
  Geometry const geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry> stages;

  __device__ __forceinline__ void run() {
    RingState<1> state_q;
    RingState<1> state_work;
    while (true) {
      Work const work = smem.work.get(state_work);
      state_work.advance();
      if (work.tile.batch < 0) {
        break;
      }
      differentiate(work, state_q);
    }
    Store{geometry, smem, warpgroup}.wait_for_store();
  }

 private:
  using Work = typename Geometry::Work;
  using Store = Epilogue<Traits, Geometry>;

  // One query tile.
  __device__ __forceinline__ void differentiate(Work const& work, RingState<1>& state_q) {
    auto const walk = geometry.part_walk(work, warpgroup);
    int const loaded = geometry.tiles_loaded(work);
    int const tiles = walk.num_partial + walk.num_full;
    constexpr float kLn2 = 0.69314718055994530942f;
    float const scale_log2 = signed_scale_log2(params);

    ThreadRows rows(has_biases<Traits>(params) ? 1.f : scale_log2);
    geometry.visit_rows(work, warpgroup, AccumulatorPosition().row,
                        [&](int r, RowTerms const& from) { rows.read(r, from); });
    auto gradient = cute::partition_fragment_C(
        typename Traits::MmaPV{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{});
    Store store{geometry, smem, warpgroup};
    cute::clear(gradient);
    if constexpr (!kHasStreams<Geometry>) {
      stages.pass_over(loaded - tiles, loaded);
    }
    smem.ring_q[warpgroup].wait(state_q);
    if (tiles > 0) {
      DqAccumulation<Traits, Geometry>{smem, geometry, warpgroup, stages}.run(
          work, walk, tiles, state_q, rows, gradient);
    } else if constexpr (!Traits::kOutputReplacesQ) {
      smem.ring_q[warpgroup].release(state_q);
    }
    if constexpr (kHasStreams<Geometry>) {
      stages.pass_over(loaded - (tiles > 0 ? walk.position(tiles - 1) + 1 : 0), loaded);
    }

    CUTE_UNROLL
    for (int i = 0; i < cute::size(gradient); ++i) {
      gradient(i) *= scale_log2 * kLn2;
    }
    store.store(gradient, work);
    if constexpr (Traits::kOutputReplacesQ) {
      store.wait_for_store();
      store.sync();
      smem.ring_q[warpgroup].release(state_q);
    }
    state_q.advance();
  }
};

}  // namespace sparse_fmha::sm90
