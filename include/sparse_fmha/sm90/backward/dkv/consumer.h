// A consumer warpgroup of dK/dV: 64 keys against every query tile that sees them, for each query
// head of the group in turn.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/backward/dkv/add_dq.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"

namespace sparse_fmha::sm90 {

// kWantsDk, kWantsDv: what this warpgroup accumulates.
template <class Traits, class Geometry, class Mechanism, bool kWantsDk, bool kWantsDv>
struct DkvConsumer {
  using Element = typename Traits::Element;
  using MmaScores = typename Traits::MmaScores;
  using MmaGradient = typename Traits::MmaGradient;
  using Work = typename Geometry::Work;
  static constexpr bool kSplit = Traits::kRoles == Roles::kSplit;
  // Whether scores of the next step are issued before the wait for the gradients' products. With
  // masks and both gradients there are not enough registers.
  static constexpr bool kAhead =
      !Geometry::kByStage &&
      !(Geometry::kMaskWarp && Traits::kHeadDim == 128 && !Traits::kDqByConsumers);
  // Whether weights are rounded 16 queries at a time between the slices of their product. It takes
  // fewer registers than to hold all in both forms.
  static constexpr bool kSliced =
      Traits::kDqByConsumers && Geometry::kMaskWarp && !Geometry::kByStage;
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
      return score * params.scale_log2;
    } else {
      float const lse = terms[AccumulatorPosition::column_of(i)].lse_log2;
      return fmaf(score, params.scale_log2, -lse);
    }
  }
  static __device__ __forceinline__ float without_delta(float grad, RowTerms const* terms, int i) {
    return kTermsFirst ? grad : grad - terms[AccumulatorPosition::column_of(i)].delta;
  }
  struct NoDq {
    DkvParams<Geometry, Mechanism> const& params;
    StorageOf<Traits, Geometry>& smem;
    static __device__ __forceinline__ int new_sums() { return 0; }
  };
  using DqOf = std::conditional_t<Traits::kDqByConsumers, AddDq<Traits, Geometry, Mechanism>, NoDq>;
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
  }

 private:
  static __device__ __forceinline__ auto new_gradient() {
    return cute::partition_fragment_C(MmaGradient{},
                                      cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{});
  }
  static __device__ __forceinline__ auto new_scores() {
    return cute::partition_fragment_C(MmaScores{},
                                      cute::Shape<cute::_64, cute::Int<Traits::kTileQ>>{});
  }
  // The 64 keys or values of this warpgroup.
  __device__ __forceinline__ auto rows_of(Element* tile) const {
    using namespace cute;
    return local_tile(make_tensor(make_smem_ptr(tile), typename Traits::LayoutKeys{}),
                      Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(part, _0{}));
  }
  // The same as operand A: descriptors, or registers that are still to be filled.
  __device__ __forceinline__ auto operand_keys(Element* tile) const {
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_A(rows_of(tile));
  }
  template <class Operand>
  __device__ __forceinline__ void load_registers(Element* tile, Operand& operand) const {
    using namespace cute;
    if constexpr (Traits::kKeysInRegisters) {
      auto copy_in = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, MmaScores{});
      auto thread_copy = copy_in.get_slice(threadIdx.x % 128);
      auto rows = as_position_independent_swizzle_tensor(rows_of(tile));
      cute::copy(copy_in, thread_copy.partition_S(rows), thread_copy.retile_D(operand));
    }
  }
  // Marks the accumulator's contents as dead. Otherwise the fences around products keep it in
  // registers.
  template <class Accumulator>
  static __device__ __forceinline__ void forget(Accumulator& accumulator) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(accumulator); ++i) {
      asm volatile("" : "=f"(accumulator(i)));
    }
  }
  // The descriptors of all slices of both operands need too many registers. A false dependence on
  // the step's index makes the compiler recompute them in each step.
  template <class Operand>
  static __device__ __forceinline__ decltype(auto) anew(Operand& operand, int i) {
    if constexpr (Traits::kKeysInRegisters) {
      return (operand);
    } else {
      return cute::make_tensor(operand.data() + (i >> 28), operand.layout());
    }
  }
  // All stages of queries or dO, as operand B of the scores and of the gradients.
  static __device__ __forceinline__ auto operand_rows(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRows{});
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }
  static __device__ __forceinline__ auto operand_rows_t(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRowsT{});
    return MmaGradient{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }

  // The matrix unit runs without gaps: the scores of the next step follow the gradients of this
  // one, and exponentials are computed during the step's second product.
  __device__ __forceinline__ void key_tile(Work const& work, RingState<1> const& state_keys,
                                           RingState<Traits::kStages>& state) {
    using namespace cute;
    auto const walk = geometry.walk(work);
    int const column = AccumulatorPosition().column;
    auto dk = new_gradient();
    auto dv = new_gradient();
    auto scores = new_scores();
    auto grads = new_scores();  // of the weights
    clear(dk);
    clear(dv);
    DqOf const dq{params, smem};
    auto sums = dq.new_sums();
    auto keys = operand_keys(smem.k);
    auto values = operand_keys(smem.v);

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
      auto&& frag_k = anew(keys, i);
      auto frag_q = operand_rows(smem.q);
      smem.ring_q.wait(state);
      start(scores, &RowTerms::scores);
      issue_mma<kTermsFirst, Traits::kScoreSteps>(MmaScores{}, frag_k, frag_q(_, _, _, state.index),
                                                  scores);
    };
    auto issue_grads = [&](int i) {
      smem.ring_dout.wait(state);
      if constexpr (kWantsDk) {
        auto&& frag_v = anew(values, i);
        auto frag_dout = operand_rows(smem.dout);
        start(grads, &RowTerms::grads);
        issue_mma<kTermsFirst, Traits::kScoreSteps>(MmaScores{}, frag_v,
                                                    frag_dout(_, _, _, state.index), grads);
      }
    };
    // dQ of the step whose stage this is. If there is none, the product is of no use and is not
    // added up: products in a branch would be serialised.
    auto issue_dq = [&](RingState<Traits::kStages> const& of, bool there) {
      if constexpr (Traits::kDqByConsumers) {
        if (there) {
          smem.ring_grads.wait(of);
        }
        forget(sums);
        dq.issue(sums, part, of);
      }
    };
    auto add_dq = [&](RingState<Traits::kStages> const& of, bool there) {
      if constexpr (Traits::kDqByConsumers) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(sums);
        if (there) {
          smem.ring_grads.release(of);
          dq.add(sums, part, smem.query_tile(of));
        }
      }
    };
    auto convert_slice = [&](auto const& from, auto& to, int k) {
      auto const rounded = convert<Element>(make_tensor(from.data() + 8 * k, Shape<_8>{}));
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) {
        to(8 * k + i) = rounded(i);
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
          issue_dq(before, own > 0);
        } else {
          issue_grads(i);
        }
      }
      RowTerms const* const terms = smem.terms[state.index] + column;
      compiler_fence();
      auto weigh = [&](auto sees) {
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
          float const weight = exp2_approx(exponent(scores(i), terms, i));
          scores(i) = sees(i) ? weight : kHidden;
        }
      };
      // From weights and their gradients to gradients of the scores, without the scale.
      auto differentiate = [&](int first, int end, auto hides) {
        CUTE_UNROLL
        for (int i = first; i < end; ++i) {
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
      add_dq(before, own > 0);
      if constexpr (Traits::kDqByConsumers || (kAhead && !kGradsAhead)) {
        issue_grads(own);
      }
      [[maybe_unused]] typename Traits::Weights weights;
      [[maybe_unused]] typename Traits::Weights rounded;
      if constexpr (kWantsDv && !kSliced) {
        convert_into(scores, weights);
      }
      if constexpr (kWantsDk) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(grads);
      }
      if constexpr (kSliced) {
        auto const frag_doutt = operand_rows_t(smem.dout);
        auto const frag_dout = frag_doutt(_, _, _, state.index);
        warpgroup_fence_operand(dv);
        CUTE_UNROLL
        for (int k = 0; k < Traits::kTileQ / 16; ++k) {
          convert_slice(scores, weights, k);
          auto slice = weights(_, _, k);
          warpgroup_fence_operand(slice);
          warpgroup_arrive();
          gemm(MmaGradient{}, slice, frag_dout(_, _, k), dv);
          warpgroup_commit_batch();
          if (masked) {
            differentiate(8 * k, 8 * k + 8, [&](int i) { return signbit(scores(i)); });
          } else {
            differentiate(8 * k, 8 * k + 8, [](int /*i*/) { return false; });
          }
          convert_slice(grads, rounded, k);
        }
      } else if constexpr (kWantsDv) {
        auto frag_doutt = operand_rows_t(smem.dout);
        issue_mma<true, Traits::kTileQ / 16>(MmaGradient{}, weights,
                                             frag_doutt(_, _, _, state.index), dv);
      }
      if constexpr (kWantsDk) {
        compiler_fence();
        if constexpr (!kSliced) {
          if (masked) {
            // A select, not only a multiplication by zero: a hidden value may be infinite.
            differentiate(0, size(scores), [&](int i) { return signbit(scores(i)); });
          } else {
            differentiate(0, size(scores), [](int /*i*/) { return false; });
          }
          convert_into(grads, rounded);
        }
        if constexpr (Traits::kAddsDq) {
          publish(rounded, state);
        }
        auto frag_qt = operand_rows_t(smem.q);
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
      if constexpr (Traits::kDqByConsumers && kAhead) {
        issue_dq(done, true);
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
        issue_dq(last, true);
      }
      add_dq(last, true);
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
        publish(nothing, state);
      }
      state.advance();
      smem.ring_q.release(done);
      smem.ring_dout.release(done);
    };

    smem.ring_keys.wait(state_keys);
    load_registers(smem.k, keys);
    load_registers(smem.v, values);
    if constexpr (Geometry::kByStage) {
      CUTE_NO_UNROLL
      for (int i = 0; i < geometry.tiles_loaded(work); ++i) {
        smem.ring_q.wait(state);
        auto const use = geometry.use(part, state);
        if (!use.seen) {
          pass_over(i);
        } else if (use.masked) {
          step(i, i, true_type{}, false_type{});
        } else {
          step(i, i, false_type{}, false_type{});
        }
      }
      if (geometry.tiles_loaded(work) > 0) {
        finish_dq();
      }
    } else if constexpr (!kAhead) {
      int const tiles = walk.num_partial + walk.num_full;
      CUTE_NO_UNROLL
      for (int head = 0; head < params.heads_per_kv; ++head) {
        CUTE_NO_UNROLL
        for (int i = 0; i < walk.num_partial; ++i) {
          step(head * tiles + i, i, true_type{}, false_type{});
        }
        CUTE_NO_UNROLL
        for (int i = walk.num_partial; i < tiles; ++i) {
          step(head * tiles + i, i, false_type{}, false_type{});
        }
      }
      if (tiles > 0) {
        finish_dq();
      }
    } else {
      int const tiles = walk.num_partial + walk.num_full;
      int const steps = tiles * params.heads_per_kv;
      if (steps > 0) {
        issue_scores(0);
        if constexpr (kGradsAhead) {
          issue_grads(0);
        }
        issue_dq(state, false);
        int tile = 0;
        CUTE_NO_UNROLL
        for (int i = 1; i < steps; ++i) {
          step(i, tile, tile < walk.num_partial, true_type{});
          tile = tile + 1 == tiles ? 0 : tile + 1;
        }
        step(steps, tile, tile < walk.num_partial, false_type{});
        finish_dq();
      }
    }
    wait_for_reads(state_keys);
    store(dk, dv, work);
    smem.ring_keys.release(state_keys);
  }

  // Hands the gradients of scores to the warpgroup of dQ.
  __device__ __forceinline__ void publish(typename Traits::Weights& rounded,
                                          RingState<Traits::kStages> const& state) {
    using namespace cute;
    auto tiles = make_tensor(make_smem_ptr(smem.grads), typename Traits::LayoutGrads{});
    auto rows = local_tile(tiles(_, _, state.index), Shape<_64, Int<Traits::kTileQ>>{},
                           make_coord(part, _0{}));
    auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, MmaScores{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    // The registers of operand A are those of the accumulator.
    auto values = make_tensor(rounded.data(), new_scores().layout());
    smem.ring_grads.acquire(state);
    cute::copy(copy_out, thread_copy.retile_S(values),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(rows)));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      smem.ring_grads.full[state.index].arrive();
    }
  }

  template <class Gradient>
  __device__ __forceinline__ void store(Gradient& dk, Gradient& dv, Work const& work) {
    using namespace cute;
    if constexpr (kWantsDv) {
      to_shared(dv, smem.v);
    }
    if constexpr (kWantsDk) {
      CUTE_UNROLL
      for (int i = 0; i < size(dk); ++i) {
        dk(i) *= params.scale;
      }
      to_shared(dk, smem.k);
    }
    tma_store_fence();
    sync_warpgroup();
    if (threadIdx.x % 128 == 0) {
      if constexpr (kWantsDv) {
        geometry.store_dv(smem.v + part * 64 * 64, work, part);
      }
      if constexpr (kWantsDk) {
        geometry.store_dk(smem.k + part * 64 * 64, work, part);
      }
      tma_store_arrive();
      tma_store_wait<0>();
    }
    sync_warpgroup();  // each warp releases the tile, once the store has read it
  }

  template <class Gradient>
  __device__ __forceinline__ void to_shared(Gradient const& gradient, Element* tile) const {
    using namespace cute;
    auto rows = rows_of(tile);
    auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, MmaGradient{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    auto rounded = convert<Element>(gradient);
    cute::copy(copy_out, thread_copy.retile_S(rounded),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(rows)));
  }

  static constexpr int kFirstBarrier = 1;
  __device__ __forceinline__ void sync_warpgroup() const {
    cutlass::arch::NamedBarrier::sync(128, kFirstBarrier + warpgroup);
  }
  // Gradients overwrite keys and values: waits until all consumers that hold these keys have read
  // them. Split roles are two instantiations, so they meet at an mbarrier: a named barrier would be
  // reached at two places of the code.
  __device__ __forceinline__ void wait_for_reads(RingState<1> const& state_keys) const {
    if constexpr (kSplit || Traits::kDqByConsumers) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        smem.keys_read.arrive();
      }
      smem.keys_read.wait(state_keys.phase);
    } else {
      sync_warpgroup();
      if constexpr (Traits::kDqByWarpgroup) {
        smem.keys_read.wait(state_keys.phase);
      }
    }
  }
};

}  // namespace sparse_fmha::sm90
