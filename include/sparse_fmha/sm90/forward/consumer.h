// A consumer warpgroup: 64 query rows against every key tile of the walk.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/forward/accumulation.h"
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/forward/turns.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct Consumer {
  KernelParams<Geometry, Mechanism> const& params;
  SharedStorage<Traits, Geometry>& smem;
  Geometry const geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry> stages;

  __device__ __forceinline__ void run() {
    RingState<1> state_q;
    RingState<1> state_work;
    if (warpgroup == 0) {
      Turns::give_to(0);
    }
    while (true) {
      Work const work = smem.work.get(state_work);
      state_work.advance();
      if (work.tile.batch < 0) {
        break;
      }
      attend(work, state_q);
    }
    Store{geometry, smem, warpgroup}.wait_for_store();
  }

 private:
  using Work = typename Geometry::Work;
  using Store = Epilogue<Traits, Geometry>;
  using Turns = sm90::Turns<Traits>;

  // One query tile.
  __device__ __forceinline__ void attend(Work const& work, RingState<1>& state_q) {
    auto const walk = geometry.part_walk(work, warpgroup);
    int const loaded = geometry.tiles_loaded(work);
    int const tiles = walk.num_partial + walk.num_full;

    auto output = cute::partition_fragment_C(
        typename Traits::MmaPV{}, cute::Shape<cute::_64, cute::Int<Traits::kValueDim>>{});
    // With biases the scores are in log2 units before the softmax.
    OnlineSoftmax softmax(Traits::kKeyBias ? 1.f : params.scale_log2);
    Store store{geometry, smem, warpgroup};
    cute::clear(output);
    if constexpr (!kHasStreams<Geometry>) {
      stages.pass_over(loaded - tiles, loaded);
    }
    smem.ring_q[warpgroup].wait(state_q);
    if (tiles > 0) {
      Accumulation<Traits, Geometry, Mechanism>{params, smem, geometry, warpgroup, stages}.run(
          work, walk, tiles, state_q, store, softmax, output);
    } else if constexpr (!Traits::kOutputReplacesQ) {
      smem.ring_q[warpgroup].release(state_q);
    }

    if constexpr (kHasStreams<Geometry>) {
      stages.pass_over(loaded - (tiles > 0 ? walk.position(tiles - 1) + 1 : 0), loaded);
    }

    float rescale[kRowsPerThread];
    float lse[kRowsPerThread];
    softmax.finish(rescale, lse);
    rescale_rows(output, rescale);
    if (threadIdx.x % 4 == 0) {  // four threads hold the same rows
      geometry.visit_rows(work, warpgroup, AccumulatorPosition().row,
                          [&](int r, float& to) { to = lse[r]; });
    }
    store.store(output, work);
    if constexpr (Traits::kOutputReplacesQ) {
      store.wait_for_store();
      store.sync();
      smem.ring_q[warpgroup].release(state_q);
    }
    state_q.advance();
  }
};

}  // namespace sparse_fmha::sm90
