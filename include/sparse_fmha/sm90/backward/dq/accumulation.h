// How a consumer warpgroup accumulates dQ over the key tiles of a query tile: three products per
// key tile.
//
// The matrix unit runs without gaps: while the second product of a tile runs, its first one becomes
// weights, and the third product of a tile is followed by the first one of the next.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/planning/list_walk.h"
#include "sparse_fmha/sm90/backward/dq/traits.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/soft_cap.h"
#include "sparse_fmha/sm90/common/stay_behind.h"
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Params>
__device__ __forceinline__ float signed_scale_log2(Params const& params) {
  return params.negate ? -params.scale_log2 : params.scale_log2;
}

// The per-row terms that a thread holds. exponent_scale: of scores without a bias, or 1 where these
// have been scaled with their bias.
struct ThreadRows {
  float const exponent_scale;
  float lse_log2[kRowsPerThread];
  float delta[kRowsPerThread];

  // Rows outside the tensor have weight 0.
  __device__ __forceinline__ explicit ThreadRows(float scale) : exponent_scale(scale) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      lse_log2[r] = INFINITY;
      delta[r] = 0.f;
    }
  }
  __device__ __forceinline__ void read(int r, RowTerms const& from) {
    float2 const terms = __ldg(reinterpret_cast<float2 const*>(&from));
    lse_log2[r] = terms.x;
    delta[r] = terms.y;
  }
};

template <class Traits, class Geometry>
struct DqAccumulation {
  using MmaQK = typename Traits::MmaQK;
  using MmaPV = typename Traits::MmaPV;
  using TileK = cute::Int<Traits::kTileK>;
  using Storage = SharedStorage<Traits, Geometry>;
  using Work = typename Geometry::Work;
  using Place = RingState<Traits::kStages>;
  static constexpr bool kNeeded = Geometry::kStageUse == StageUse::kNeeded;
  static constexpr bool kByWalk = Geometry::kMaskedStages == MaskedStages::kByWalk;
  // Whether a tile's keys are still in use during the wait for the next tile's keys.
  static constexpr bool kOverlaps = Traits::kStages > 1;
  // Whether a stage of the other consumer in between would then need the same slot.
  static constexpr bool kOthersWait = kOverlaps && kHasStreams<Geometry> && Traits::kStages == 2;

  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry>& stages;

  // Computes the sum over the walk's key tiles, not yet scaled.
  template <class Walk, class Output>
  __device__ __forceinline__ void run(Work const& work, Walk const& walk, int tiles,
                                      RingState<1> const& state_q, ThreadRows const& rows,
                                      Output& output) {
    using namespace cute;
    constexpr true_type kYes{};
    constexpr false_type kNo{};
    constexpr bool_constant<kOverlaps> kFollows{};
    auto& state = stages.state;
    state.retreat();  // from here on, the stage of the last tile reached
    typename Geometry::Mask mask(geometry, warpgroup);
    mask.set(work);
    auto const frag_q = operand_q<Traits>(smem.q, warpgroup);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_k<Traits>(smem.v);
    auto frag_kt = operand_v<Traits>(smem.k);
    Weights<Traits> dscores;  // of the last tile, until they are multiplied with its keys

    // An operand in shared memory, `bytes` after `operand`. The descriptors of all slices of all
    // operands need too many uniform registers. A false dependence on the tile's index makes the
    // compiler recompute them for each tile.
    int none = 0;
    auto anew = [&](auto const& operand, int bytes = 0) {
      return make_tensor(operand.data() + (bytes / 16 + none), operand.layout());
    };
    auto issue_gradient = [&] {
      auto const keys = anew(frag_kt(_, _, _, state.index));
      issue_mma<true, Traits::kTileK / 16>(MmaPV{}, dscores, keys, output);
    };
    auto finish_gradient = [&] {
      issue_gradient();
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_k.release(state);
    };
    WholeStages whole{walk.num_partial, tiles};  // the tiles without a mask
    if constexpr (kByWalk) {
      whole = walk.whole;
    }
    auto is_masked = [&](int i) { return i < whole.begin || i >= whole.end; };
    // The i-th tile and, if the gradients of the previous tile are pending, their product.
    auto step = [&](int i, auto masked, auto follows) {
      constexpr bool kMasked = decltype(masked)::value;
      constexpr bool kFollowing = decltype(follows)::value;
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      auto dweights = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      none = i >> 28;
      if constexpr (kFollowing) {
        issue_gradient();
      }
      [[maybe_unused]] Place const previous = state;
      state.advance();
      stages.enter(walk, i);
      stages.wait(smem.ring_k, walk, i, state);
      auto queries = anew(frag_q);
      auto const keys = anew(frag_k(_, _, _, state.index));
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, queries, keys, scores);
      if constexpr (kFollowing) {
        warpgroup_wait<1>();
        warpgroup_fence_operand(output);
        smem.ring_k.release(previous);
      }
      stages.wait(smem.ring_v, walk, i, state);
      auto douts = anew(frag_q, Traits::kBytesQ);
      auto const values = anew(frag_v(_, _, _, state.index));
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, douts, values, dweights);
      [[maybe_unused]] typename Geometry::Mask::Seen seen;
      if constexpr (kMasked) {
        seen = mask.look_up(work, geometry.mask_place(walk, i, state));
      }
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      if constexpr (Traits::kKeyBias) {
        if (has_biases<Traits>(geometry.params)) {
          float factor = signed_scale_log2(geometry.params);
          SoftCap const& cap = geometry.params.soft_cap;
          if (cap.given()) {
            // The slope has no register until the weights are there, so it changes their gradients.
            warpgroup_wait<0>();
            warpgroup_fence_operand(dweights);
            factor = cap.apply(scores, factor);
            CUTE_UNROLL
            for (int n = 0; n < size(scores); ++n) {
              float const delta = rows.delta[AccumulatorPosition::row_of(n)];
              dweights(n) = fmaf(dweights(n) - delta, SoftCap::slope(scores(n)), delta);
            }
          }
          smem.key_biases.add(scores, state, factor,
                              RowThresholds<Geometry>{geometry.params.bias, geometry, work});
        }
      }
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        scores(n) = exp2_approx(
            fmaf(scores(n), rows.exponent_scale, -rows.lse_log2[AccumulatorPosition::row_of(n)]));
      }
      // All of them before the wait: it stays after a value that seems to depend on each one's
      // sign.
      uint32_t signs = 0;
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        signs |= __float_as_uint(scores(n));
      }
      stay_behind(__uint_as_float(signs));
      warpgroup_wait<0>();
      warpgroup_fence_operand(dweights);
      smem.ring_v.release(state);
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        scores(n) *= dweights(n) - rows.delta[AccumulatorPosition::row_of(n)];
      }
      if (kMasked && (kFollowing || is_masked(i))) {
        CUTE_UNROLL
        for (int n = 0; n < size(scores); ++n) {
          scores(n) = mask.sees(seen, n) ? scores(n) : 0.f;
        }
      }
      convert_into(scores, dscores);
      if constexpr (!kOverlaps) {
        finish_gradient();
      }
    };

    // A step that follows another.
    auto next_step = [&](int i, auto masked) {
      if constexpr (kOthersWait) {
        if (walk.follows_other(i)) {
          finish_gradient();
          step(i, masked, kNo);
          return;
        }
      }
      step(i, masked, kFollows);
    };

    int i = 0;
    bool follows = false;  // whether gradients are pending
    auto first_step = [&] {
      step(i++, kYes, kNo);
      follows = kOverlaps;
    };
    if constexpr (kNeeded) {
      // Passes over the next tile if only other warpgroups need it; returns whether it did.
      auto is_for_others = [&] {
        auto next = state;
        next.advance();
        smem.ring_k.wait(next);
        if (geometry.needs(warpgroup, next)) {
          return false;
        }
        if (follows) {
          finish_gradient();
          follows = false;
        }
        smem.ring_k.release(next);
        smem.ring_v.wait(next);
        smem.ring_v.release(next);
        state = next;
        return true;
      };
      CUTE_NO_UNROLL
      while (i < walk.num_partial) {
        if (is_for_others()) {
          ++i;
        } else if (follows) {
          step(i++, kYes, kFollows);
        } else {
          first_step();
        }
      }
      if (i < tiles && !follows) {
        first_step();
      }
      CUTE_NO_UNROLL
      for (; i < tiles; ++i) {
        step(i, kNo, kFollows);
      }
    } else {
      // Masked tiles, then tiles without a mask, and, if the walk says so, masked ones again.
      first_step();
      int masked_end = whole.begin;
      CUTE_NO_UNROLL
      while (i < tiles) {
        CUTE_NO_UNROLL
        for (; i < masked_end; ++i) {
          next_step(i, kYes);
        }
        CUTE_NO_UNROLL
        for (; i < whole.end; ++i) {
          next_step(i, kNo);
        }
        masked_end = tiles;
      }
    }
    if constexpr (!Traits::kOutputReplacesQ) {
      smem.ring_q[warpgroup].release(state_q);  // the last product that reads it is done
    }
    if (follows) {
      finish_gradient();
    }
    state.advance();
  }
};

}  // namespace sparse_fmha::sm90
