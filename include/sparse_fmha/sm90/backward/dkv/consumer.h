// A consumer warpgroup of dK/dV: 64 keys against every query tile that sees them, for each query
// head of the group in turn.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/backward/dkv/consumer_dq.h"
#include "sparse_fmha/sm90/backward/dkv/epilogue.h"
#include "sparse_fmha/sm90/backward/dkv/key_bias.h"
#include "sparse_fmha/sm90/backward/dkv/operands.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"

namespace sparse_fmha::sm90 {

// kWantsDk, kWantsDv: what this warpgroup accumulates.
template <class Traits, class Geometry, class Mechanism, bool kWantsDk, bool kWantsDv>
struct DkvConsumer {
  using Operands = DkvOperands<Traits>;
  using MmaScores = typename Traits::MmaScores;
  using MmaGradient = typename Traits::MmaGradient;
  using Work = typename Geometry::Work;
  // Whether scores of the next step are issued before the wait for the gradients' products. With
  // masks and both gradients there are not enough registers.
  static constexpr bool kAhead =
      !Geometry::kByStage && !(Geometry::kMaskWarp && Traits::kHeadDim == 128);
  // Whether gradients of weights are issued ahead, too. Otherwise dQ of the last step or a mask has
  // their registers.
  static constexpr bool kGradsAhead =
      kAhead && !Traits::kDqByConsumers && !(Geometry::kMaskWarp && Traits::kDqByWarpgroup);
  // Products that are issued behind the scores before these are waited for.
  static constexpr int kBehindScores =
      kWantsDk && (kGradsAhead || !kAhead || Traits::kDqByConsumers) ? 1 : 0;
  // Whether the terms of the rows are what products start with. Otherwise they are read after the
  // products, which takes longer but fewer registers while products run.
  static constexpr bool kTermsFirst = Traits::kDqByConsumers;
  __device__ __forceinline__ float exponent(float score, RowTerms const* terms, int i) const {
    if constexpr (kTermsFirst) {
      return score * params.scale_log2;  // without biases
    } else {
      float const lse = terms[AccumulatorPosition::column_of(i)].lse_log2;
      return fmaf(score, params.exponent_scale, -lse);
    }
  }
  static __device__ __forceinline__ float without_delta(float grad, RowTerms const* terms, int i) {
    return kTermsFirst ? grad : grad - terms[AccumulatorPosition::column_of(i)].delta;
  }
  using Bias = DkvBias<Traits, Geometry, DkvParams<Geometry, Mechanism>,
                       StorageOf<Traits, Geometry>, kWantsDk>;
  static constexpr float kHidden = -0.f;  // weight of a hidden pair; others are positive

  DkvParams<Geometry, Mechanism> const& params;
  StorageOf<Traits, Geometry>& smem;
  Geometry const geometry;
  int const warpgroup;  // among the consumers
  int const part;       // which 64 keys of the tile

  __device__ __forceinline__ void run() {
    RingState<1> state_work;
    RingState<Traits::kStages> state;
    while (true) {
      Work const work = smem.work.get(state_work);
      if (work.tile.batch < 0) {
        break;
      }
      key_tile(work, state_work, state);
      state_work.advance();
    }
    cute::tma_store_wait<0>();  // shared memory outlives the stores that read it
  }

 private:
  // The matrix unit runs without gaps: the scores of the next step follow the gradients of this
  // one, and exponentials are computed during the step's second product.
  __device__ __forceinline__ void key_tile(Work const& work, RingState<1> const& state_keys,
                                           RingState<Traits::kStages>& state) {
    using namespace cute;
    auto const walk = geometry.walk(work);
    int const column = AccumulatorPosition().column;
    auto dk = Operands::new_gradient();
    auto dv = Operands::new_gradient();
    auto scores = Operands::new_scores();
    auto grads = Operands::new_scores();  // of the weights
    clear(dk);
    clear(dv);
    auto const dq = consumer_dq<Traits>(params, smem, part);
    auto sums = dq.new_sums();
    Bias const bias{params, smem, geometry, warpgroup, part};
    auto keys = Operands::keys(smem.k, part);
    auto values = Operands::keys(smem.v, part);

    auto start = [&](auto& products, float RowTerms::* term) {
      if constexpr (kTermsFirst) {
        CUTE_UNROLL
        for (int i = 0; i < size(products); ++i) {
          products(i) = smem.terms[state.index][column + AccumulatorPosition::column_of(i)].*term;
        }
      } else {
        forget(products);
      }
    };
    auto issue_scores = [&](int i) {
      auto&& frag_k = Operands::anew(keys, i);
      auto frag_q = Operands::rows(smem.q);
      smem.ring_q.wait(state);
      start(scores, &RowTerms::scores);
      issue_mma<kTermsFirst, Traits::kScoreSteps>(MmaScores{}, frag_k, frag_q(_, _, _, state.index),
                                                  scores);
    };
    auto issue_grads = [&](int i) {
      smem.ring_dout.wait(state);
      if constexpr (kWantsDk) {
        auto&& frag_v = Operands::anew(values, i);
        auto frag_dout = Operands::rows(smem.dout);
        start(grads, &RowTerms::grads);
        issue_mma<kTermsFirst, Traits::kScoreSteps>(MmaScores{}, frag_v,
                                                    frag_dout(_, _, _, state.index), grads);
      }
    };
    // The step before the i-th over all heads; `tile` is its index in its head. kMore: there is an
    // i-th.
    auto step = [&](int i, int tile, auto masked, auto more) __attribute__((always_inline)) {
      constexpr bool kMore = decltype(more)::value;
      [[maybe_unused]] int const own = kAhead ? i - 1 : i;  // index of this step
      auto before = state;
      before.retreat();
      if constexpr (!kAhead) {
        issue_scores(i);
        if constexpr (Traits::kDqByConsumers) {
          dq.issue(sums, before, own > 0);
        } else {
          issue_grads(i);
        }
      }
      RowTerms const* const terms = smem.terms[state.index] + column;
      compiler_fence();
      auto weigh = [&](auto sees) {
        bias.add(scores, terms);
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
          float const weight = exp2_approx(exponent(scores(i), terms, i));
          scores(i) = sees(i) ? weight : kHidden;
        }
      };
      // From weights and their gradients to gradients of the scores, without the scale.
      auto differentiate = [&](auto hides) {
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
          float const grad = scores(i) * without_delta(grads(i), terms, i);
          grads(i) = hides(i) ? 0.f : grad;
        }
      };
      if (masked) {
        // One mask per step: kept across steps, it takes registers that the gradients need.
        typename Geometry::Mask const mask(geometry, work, part);
        auto const seen = mask.look_up(geometry.mask_place(walk, tile, state));
        warpgroup_wait<kBehindScores>();
        warpgroup_fence_operand(scores);
        compiler_fence();  // terms are reloaded when used: registers are scarce
        weigh([&](int i) { return mask.sees(seen, i); });
      } else {
        warpgroup_wait<kBehindScores>();
        warpgroup_fence_operand(scores);
        compiler_fence();
        weigh([](int /*i*/) { return true; });
      }
      dq.add(sums, before, own > 0);
      if constexpr (Traits::kDqByConsumers || (kAhead && !kGradsAhead)) {
        issue_grads(own);
      }
      [[maybe_unused]] typename Traits::Weights weights;
      [[maybe_unused]] typename Traits::Weights rounded;
      if constexpr (kWantsDv) {
        convert_into(scores, weights);
      }
      if constexpr (kWantsDk) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(grads);
      }
      if constexpr (kWantsDv) {
        auto frag_doutt = Operands::rows_t(smem.dout);
        issue_mma<true, Traits::kTileQ / 16>(MmaGradient{}, weights,
                                             frag_doutt(_, _, _, state.index), dv);
      }
      if constexpr (kWantsDk) {
        compiler_fence();
        if (masked) {
          // A select, not only a multiplication by zero: a hidden value may be infinite.
          differentiate([&](int i) { return signbit(scores(i)); });
        } else {
          differentiate([](int /*i*/) { return false; });
        }
        bias.sum(grads);
        bias.uncap(grads, scores, terms);
        convert_into(grads, rounded);
        dq.publish(rounded, state);
        auto frag_qt = Operands::rows_t(smem.q);
        issue_mma<true, Traits::kTileQ / 16>(MmaGradient{}, rounded, frag_qt(_, _, _, state.index),
                                             dk);
      }
      auto const done = state;
      state.advance();
      if constexpr (kMore && kAhead) {
        issue_scores(i);
      }
      warpgroup_wait<kMore && kAhead ? 1 : 0>();
      if constexpr (kWantsDk) {
        warpgroup_fence_operand(dk);
      }
      if constexpr (kWantsDv) {
        warpgroup_fence_operand(dv);
      }
      smem.ring_q.release(done);
      smem.ring_dout.release(done);
      if constexpr (kAhead) {
        dq.issue(sums, done, true);
      }
      if constexpr (kMore && kGradsAhead) {
        issue_grads(i);  // only now: registers do not suffice for both products' operands
      }
    };

    // Adds up dQ of the last step.
    auto finish_dq = [&] {
      auto last = state;
      last.retreat();
      if constexpr (!kAhead) {
        dq.issue(sums, last, true);
      }
      dq.add(sums, last, true);
    };

    // Passes over the i-th stage, which only the other consumer needs. The flag that says so has
    // been read.
    auto pass_over = [&](int i) {
      __syncwarp();
      smem.ring_dout.wait(state);
      auto const done = state;
      if constexpr (Traits::kAddsDq) {
        if (i > 0) {
          finish_dq();
        }
        typename Traits::Weights nothing;
        clear(nothing);
        dq.publish(nothing, state);
      }
      state.advance();
      smem.ring_q.release(done);
      smem.ring_dout.release(done);
    };

    smem.ring_keys.wait(state_keys);
    Operands::load_registers(smem.k, part, keys);
    Operands::load_registers(smem.v, part, values);
    if constexpr (Geometry::kByStage) {
      int head = -1;  // whose biases are in use
      CUTE_NO_UNROLL
      for (int i = 0; i < geometry.tiles_loaded(work); ++i) {
        smem.ring_q.wait(state);
        auto const use = geometry.use(part, state);
        if (use.seen && bias.given()) {
          bias.enter(work, head, geometry.head(state));
        }
        if (!use.seen) {
          pass_over(i);
        } else if (use.masked) {
          step(i, i, true_type{}, false_type{});
        } else {
          step(i, i, false_type{}, false_type{});
        }
      }
      bias.end(work, head);
      if (geometry.tiles_loaded(work) > 0) {
        finish_dq();
      }
    } else if constexpr (!kAhead) {
      int const tiles = walk.num_partial + walk.num_full;
      CUTE_NO_UNROLL
      for (int head = 0; head < params.heads_per_kv; ++head) {
        bias.begin(work, head);
        CUTE_NO_UNROLL
        for (int i = 0; i < walk.num_partial; ++i) {
          step(head * tiles + i, i, true_type{}, false_type{});
        }
        CUTE_NO_UNROLL
        for (int i = walk.num_partial; i < tiles; ++i) {
          step(head * tiles + i, i, false_type{}, false_type{});
        }
        bias.end(work, head);
      }
      if (tiles > 0) {
        finish_dq();
      }
    } else {
      using Order = typename Geometry::Order;
      int const tiles = walk.num_partial + walk.num_full;
      int const steps = tiles * params.heads_per_kv;
      if (steps > 0) {
        issue_scores(0);
        if constexpr (kGradsAhead) {
          issue_grads(0);
        }
        // Of the stage before: nobody writes there until all consumers have begun the tile.
        auto before = state;
        before.retreat();
        dq.issue(sums, before, false);
        int tile = Order::first(tiles);
        CUTE_NO_UNROLL
        for (int i = 1; i < steps; ++i) {
          bias.follow(work, i - 1, tile, tiles);
          step(i, tile, tile < walk.num_partial, true_type{});
          tile = Order::next(tile, tiles);
        }
        bias.follow(work, steps - 1, tile, tiles);
        step(steps, tile, tile < walk.num_partial, false_type{});
        bias.end(work, params.heads_per_kv - 1);
        finish_dq();
      }
    }
    DkvEpilogue<Traits, Geometry, Mechanism, kWantsDk, kWantsDv>{params, smem, geometry, warpgroup,
                                                                 part}
        .store(dk, dv, work, state_keys);
  }
};

}  // namespace sparse_fmha::sm90
