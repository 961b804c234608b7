// A consumer warpgroup of a kernel that reduces scores: 64 held rows against each streamed tile.
#pragma once

#include <type_traits>

#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/negate.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/scores/reductions.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Reduction>
struct ScoreConsumer {
  using Held = typename Reduction::Held;
  using Scores = typename Traits::Scores;

  ScoreParams const& params;
  ScoreStorage<Traits, typename Reduction::Shared>& smem;
  ScoreWork const& work;
  int const warpgroup;  // among the consumers

  // Two consumers have two accumulators: the matrix unit multiplies the next tile while this one is
  // reduced. With more, it multiplies for the others.
  __device__ __forceinline__ void run() {
    using namespace cute;
    int32_t const row = warpgroup * 64 + AccumulatorPosition{}.row;
    Reduction reduction(params, work, row, smem.own);
    auto frag_held = operand_q<Traits>(smem.held, warpgroup);
    auto frag_streamed = operand_k<Traits>(smem.streamed);
    RingState<Traits::kStages> issued;
    RingState<Traits::kStages> taken;
    auto issue = [&](Scores& scores, int32_t tile) __attribute__((always_inline)) {
      smem.ring.wait(issued);
      // The descriptors of all slices take too many registers. A false dependence on the tile makes
      // the compiler compute them anew.
      auto held = make_tensor(frag_held.data() + (tile >> 28), frag_held.layout());
      issue_mma<false, Traits::kScoreSteps>(typename Traits::MmaQK{}, held,
                                            frag_streamed(_, _, _, issued.index), scores);
      issued.advance();
    };
    // kBehind: products that were issued after this tile's.
    auto take = [&](Scores& scores, int32_t tile, auto behind) __attribute__((always_inline)) {
      warpgroup_wait<decltype(behind)::value>();
      warpgroup_fence_operand(scores);
      if constexpr (!Reduction::kTerms) {
        smem.ring.release(taken);
      }
      if (Held::is_masked(params, work, tile)) {
        Held const mask(params, work, row, tile);
        hide_scores(scores, [&](int i, float x) { return mask.sees(i) ? x : -INFINITY; });
      }
      reduction.take(scores, smem.terms[taken.index] + AccumulatorPosition{}.column);
      if constexpr (Reduction::kTerms) {
        compiler_fence();
        __syncwarp();  // all lanes have read their terms
        smem.ring.release(taken);
      }
      taken.advance();
    };

    if (std::is_same_v<typename Reduction::Shared, NothingShared> &&
        !Held::has_row(params, work, warpgroup * 64)) {
      for (int32_t tile = work.begin; tile < work.end; ++tile, taken.advance()) {
        smem.ring.wait(taken);
        smem.ring.release(taken);
      }
      return;
    }
    smem.ring_held.wait({});
    if (params.negate) {
      negate_rows<Traits>(smem.held, warpgroup);
      cutlass::arch::NamedBarrier::sync(128, 2 + warpgroup);
    }
    if constexpr (Traits::kConsumers > 2) {
      Scores scores;
      CUTE_NO_UNROLL
      for (int32_t tile = work.begin; tile < work.end; ++tile) {
        issue(scores, tile);
        take(scores, tile, _0{});
      }
    } else if (work.begin < work.end) {
      Scores even;
      Scores odd;
      int32_t tile = work.begin;
      issue(even, tile);
      CUTE_NO_UNROLL
      for (; tile + 2 < work.end; tile += 2) {
        issue(odd, tile + 1);
        take(even, tile, _1{});
        issue(even, tile + 2);
        take(odd, tile + 1, _1{});
      }
      if (tile + 1 < work.end) {
        issue(odd, tile + 1);
        take(even, tile, _1{});
        take(odd, tile + 1, _0{});
      } else {
        take(even, tile, _0{});
      }
    }
    reduction.finish();
  }
};

}  // namespace sparse_fmha::sm90
