// The producer warps of dK/dV: one hands out key tiles, one loads them and the query tiles that see
// them, and one computes masks if they are expensive.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct DkvProducer {
  using Work = typename Geometry::Work;
  static constexpr int kReaders = 32 * (1 + Geometry::kMaskWarp);  // of the work slot
  // The next key tile is taken when so many steps of this one are still to be loaded: in time to
  // load it, and no earlier. Blocks that took it when they begin this one would not take the
  // heaviest tiles first, nor at about the same time those that share queries.
  static constexpr int kStepsToTake = 4;

  DkvParams<Geometry, Mechanism> const& params;
  StorageOf<Traits, Geometry>& smem;
  Geometry const geometry;

  // Run by one thread.
  __device__ __forceinline__ void run_work() {
    RingState<1> state;
    int32_t index = blockIdx.x;
    while (true) {
      smem.work.put(state, [&](Work& work) {
        geometry.prepare(work, params.scheduler.decode(index), state);
      });
      if (smem.work.work.tile.batch < 0) {
        return;
      }
      index = params.scheduler.take(index);
      state.advance();
    }
  }

  // Run by a whole warp.
  __device__ __forceinline__ void run_loads() {
    RingState<Traits::kStages> state;
    RingState<1> state_work;
    while (true) {
      Work const work = smem.work.peek(state_work);
      if (work.tile.batch < 0) {
        return;
      }
      auto steps = geometry.steps(work);
      // The first query tiles are loaded before the keys: their stages are free while the gradients
      // of the last key tile are still being stored.
      int const ahead = min(steps.count, Traits::kStages);
      int i = 0;
      auto load_until = [&](int end) {
        CUTE_NO_UNROLL
        for (; i < end; ++i) {
          load_step(work, steps.next(i), state);
        }
      };
      load_until(ahead);
      load_keys(work, state_work);
      load_until(steps.count - kStepsToTake);
      smem.work.let_next();
      load_until(steps.count);
      state_work.advance();
    }
  }

  // Run by a whole warp: the masks of partial tiles, computed while copies run.
  __device__ __forceinline__ void run_masks() {
    RingState<Traits::kStages> state;
    RingState<1> state_work;
    while (true) {
      Work const work = smem.work.get(state_work);
      if (work.tile.batch < 0) {
        return;
      }
      auto steps = geometry.steps(work);
      geometry.begin_masks(work);
      CUTE_NO_UNROLL
      for (int i = 0; i < steps.count; ++i) {
        // This may be done before the stage is free, since there are more masks than stages.
        geometry.publish_mask(work, steps.next(i), state);
        smem.ring_q.acquire(state);
        smem.ring_q.full[state.index].arrive();
        state.advance();
      }
      state_work.advance();
    }
  }

 private:
  template <class Step>
  __device__ __forceinline__ void load_step(Work const& work, Step const& step,
                                            RingState<Traits::kStages>& state) {
    constexpr int kBytes = Traits::kRowElements * sizeof(typename Traits::Element);
    auto const source = geometry.source(work, step);
    smem.ring_q.acquire(state);
    if (threadIdx.x % 32 == 0) {
      if constexpr (Traits::kAddsDq) {
        smem.query_tile(state) = geometry.query_tile(work, step);
      }
      smem.ring_q.expect(state, kBytes + sizeof(smem.terms[0]));
      geometry.load_q(smem.ring_q.full[state.index], smem.q + state.index * Traits::kRowElements,
                      source);
      geometry.load_terms(smem.ring_q.full[state.index], smem.terms[state.index], source);
    }
    smem.ring_dout.acquire(state);
    if (threadIdx.x % 32 == 0) {
      smem.ring_dout.expect(state, kBytes);
      geometry.load_dout(smem.ring_dout.full[state.index],
                         smem.dout + state.index * Traits::kRowElements, source);
    }
    state.advance();
  }

  __device__ __forceinline__ void load_keys(Work const& work, RingState<1> const& state) {
    constexpr int kBytes = Traits::kKeyElements * sizeof(typename Traits::Element);
    smem.ring_keys.acquire(state);
    if (threadIdx.x % 32 == 0) {
      smem.ring_keys.expect(state, 2 * kBytes);
      geometry.load_keys(smem.ring_keys.full[0], smem.k, smem.v, work);
    }
  }
};

}  // namespace sparse_fmha::sm90
