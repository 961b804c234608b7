// What a consumer warpgroup does with a query tile for the gradient of q: three products for each
// key tile.
//
// On the matrix unit they follow each other without a gap: while the second product of a tile runs,
// its first becomes weights, and behind the third of a tile comes the first of the next.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/planning/list_walk.h"
#include "sparse_fmha/sm90/backward/dq/traits.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/stay_behind.h"
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

// What a thread knows of its rows.
struct ThreadRows {
  float const scale_log2;
  float lse_log2[kRowsPerThread];
  float delta[kRowsPerThread];

  // Rows that the tensor has not weigh nothing.
  __device__ __forceinline__ explicit ThreadRows(float scale) : scale_log2(scale) {
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
  // Whether the keys of a tile are still in use when those of the next one are waited for.
  static constexpr bool kOverlaps = Traits::kStages > 1;
  // Whether a stage of another consumer between them would then be where they are.
  static constexpr bool kOthersWait = kOverlaps && kHasStreams<Geometry> && Traits::kStages == 2;

  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry>& stages;

  // The sum over the walk's key tiles, not yet scaled.
  template <class Walk, class Output>
  __device__ __forceinline__ void run(Work const& work, Walk const& walk, int tiles,
                                      RingState<1> const& state_q, ThreadRows const& rows,
                                      Output& output) {
    using namespace cute;
    constexpr true_type kYes{};
    constexpr false_type kNo{};
    constexpr bool_constant<kOverlaps> kFollows{};
    auto& state = stages.state;
    state.retreat();  // from here on it is that of the last tile that has been reached
    typename Geometry::Mask mask(geometry, warpgroup);
    mask.set(work);
    auto const frag_q = operand_q<Traits>(smem.q, warpgroup);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_k<Traits>(smem.v);
    auto frag_kt = operand_v<Traits>(smem.k);
    Weights<Traits> dscores;  // of the last tile, until they meet its keys

    // An operand in shared memory, `bytes` behind `operand`. The descriptors of all slices of all
    // operands are more than there are uniform registers, so they are to be worked out anew for
    // each tile: they seem to hang on its number.
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
    WholeStages whole{walk.num_partial, tiles};  // of the tiles those without a mask
    if constexpr (kByWalk) {
      whole = walk.whole;
    }
    auto is_masked = [&](int i) { return i < whole.begin || i >= whole.end; };
    // The i-th tile, and, where it follows one whose gradients are at hand, their product.
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
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        scores(n) = exp2_approx(
            fmaf(scores(n), rows.scale_log2, -rows.lse_log2[AccumulatorPosition::row_of(n)]));
      }
      // All of them before the wait: it stays behind what seems to hang on each one's sign.
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

    // A step behind another.
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
    bool follows = false;  // whether gradients are at hand
    auto first_step = [&] {
      step(i++, kYes, kNo);
      follows = kOverlaps;
    };
    if constexpr (kNeeded) {
      // Whether the next tile is for other warpgroups alone; it is then passed over.
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
      // Masked tiles, some without a mask, and, where the walk says so, masked ones.
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
