// A consumer warpgroup: 64 keys against every query tile that sees them, head by head of the group.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/softmax.h"
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
  static constexpr float kHidden = -0.f;  // a weight of a pair that is hidden; others are positive

  DkvParams<Geometry, Mechanism> const& params;
  DkvStorage<Traits, Geometry>& smem;
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
  // 64 keys, or values, as first operand.
  __device__ __forceinline__ auto operand_keys(Element* tile) const {
    using namespace cute;
    auto rows = local_tile(make_tensor(make_smem_ptr(tile), typename Traits::LayoutKeys{}),
                           Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(part, _0{}));
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_A(rows);
  }
  // Descriptors of all slices of both operands are more than there are registers, so they are to be
  // worked out anew for each step: they seem to hang on its number.
  template <class Operand>
  static __device__ __forceinline__ auto anew(Operand const& operand, int i) {
    return cute::make_tensor(operand.data() + (i >> 28), operand.layout());
  }
  // All stages of queries, or of dO, as second operand of the scores, and of the gradients.
  static __device__ __forceinline__ auto operand_rows(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRows{});
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }
  static __device__ __forceinline__ auto operand_rows_t(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRowsT{});
    return MmaGradient{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }

  __device__ __forceinline__ void key_tile(Work const& work, RingState<1> const& state_keys,
                                           RingState<Traits::kStages>& state) {
    using namespace cute;
    auto dk = new_gradient();
    auto dv = new_gradient();
    clear(dk);
    clear(dv);
    auto const walk = geometry.walk(work);
    int const column = AccumulatorPosition().column;

    auto step = [&](auto masked, int i) {
      constexpr bool kMasked = decltype(masked)::value;
      auto frag_k = anew(operand_keys(smem.k), i);
      auto frag_v = anew(operand_keys(smem.v), i);
      auto frag_q = operand_rows(smem.q);
      auto frag_dout = operand_rows(smem.dout);
      auto frag_qt = operand_rows_t(smem.q);
      auto frag_doutt = operand_rows_t(smem.dout);
      auto scores = new_scores();
      auto grads = new_scores();  // of the weights
      typename Traits::Weights weights;
      RowTerms const* const terms = smem.terms[state.index] + column;
      smem.ring_q.wait(state);
      compiler_fence();  // the terms are there, too
      issue_mma<false, Traits::kScoreSteps>(MmaScores{}, frag_k, frag_q(_, _, _, state.index),
                                            scores);
      smem.ring_dout.wait(state);
      if constexpr (kWantsDk) {
        issue_mma<false, Traits::kScoreSteps>(MmaScores{}, frag_v, frag_dout(_, _, _, state.index),
                                              grads);
      }
      // Of each step's own: kept across steps, it costs registers that the gradients need.
      typename Geometry::Mask const mask(geometry, work, part);
      [[maybe_unused]] typename Geometry::Mask::Seen seen;
      if constexpr (kMasked) {
        seen = mask.look_up(geometry.mask_place(walk, i, state));
      }
      warpgroup_wait<kWantsDk ? 1 : 0>();
      warpgroup_fence_operand(scores);
      compiler_fence();  // terms are read when they are used: registers are few
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        float const lse = terms[AccumulatorPosition::column_of(i)].lse_log2;
        float const weight = exp2_approx(fmaf(scores(i), params.scale_log2, -lse));
        scores(i) = !kMasked || mask.sees(seen, i) ? weight : kHidden;
      }
      if constexpr (kWantsDv) {
        convert_into(scores, weights);
      }
      if constexpr (kWantsDk) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(grads);
      }
      if constexpr (kWantsDv) {
        issue_mma<true, Traits::kTileQ / 16>(MmaGradient{}, weights,
                                             frag_doutt(_, _, _, state.index), dv);
      }
      if constexpr (kWantsDk) {
        compiler_fence();
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
          float const delta = terms[AccumulatorPosition::column_of(i)].delta;
          float const grad = scores(i) * (grads(i) - delta);
          // Selected, not only multiplied by zero: a value that is hidden may be infinite.
          grads(i) = kMasked && signbit(scores(i)) ? 0.f : grad;
        }
        typename Traits::Weights rounded;
        convert_into(grads, rounded);
        issue_mma<true, Traits::kTileQ / 16>(MmaGradient{}, rounded, frag_qt(_, _, _, state.index),
                                             dk);
      }
      warpgroup_wait<0>();
      if constexpr (kWantsDk) {
        warpgroup_fence_operand(dk);
      }
      if constexpr (kWantsDv) {
        warpgroup_fence_operand(dv);
      }
      smem.ring_q.release(state);
      smem.ring_dout.release(state);
      state.advance();
    };

    smem.ring_keys.wait(state_keys);
    CUTE_NO_UNROLL
    for (int head = 0; head < params.heads_per_kv; ++head) {
      CUTE_NO_UNROLL
      for (int i = 0; i < walk.num_partial; ++i) {
        step(true_type{}, i);
      }
      CUTE_NO_UNROLL
      for (int i = 0; i < walk.num_full; ++i) {
        step(false_type{}, i);
      }
    }
    store(dk, dv, work);
    smem.ring_keys.release(state_keys);
  }

  template <class Gradient>
  __device__ __forceinline__ void store(Gradient& dk, Gradient& dv, Work const& work) {
    using namespace cute;
    sync();  // the keys and values that gradients overwrite have been read
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
    sync_warpgroup();  // each warp releases the tile, and only once it has been read
  }

  template <class Gradient>
  __device__ __forceinline__ void to_shared(Gradient const& gradient, Element* tile) const {
    using namespace cute;
    auto rows = local_tile(make_tensor(make_smem_ptr(tile), typename Traits::LayoutKeys{}),
                           Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(part, _0{}));
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
  // With all whose keys these are.
  __device__ __forceinline__ void sync() const {
    if constexpr (kSplit) {
      cutlass::arch::NamedBarrier::sync(256, kFirstBarrier + Traits::kConsumers);
    } else {
      sync_warpgroup();
    }
  }
};

}  // namespace sparse_fmha::sm90
