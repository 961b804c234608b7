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
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

// What a thread knows of its rows.
struct RowSums {
  float const scale_log2;
  float lse_log2[kRowsPerThread];
  float delta[kRowsPerThread];

  // Rows that the tensor has not weigh nothing.
  __device__ __forceinline__ explicit RowSums(float scale) : scale_log2(scale) {
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
  // Whether the keys of a tile can still be in use when those of the next one are waited for: all
  // stages between, which another consumer may have, are then others.
  static constexpr bool kOverlaps = Traits::kStages > (kHasStreams<Geometry> ? 2 : 1);

  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry>& stages;

  // The sum over the walk's key tiles, not yet scaled.
  template <class Walk, class Output>
  __device__ __forceinline__ void run(Work const& work, Walk const& walk, int tiles,
                                      RingState<1> const& state_q, RowSums const& rows,
                                      Output& output) {
    using namespace cute;
    constexpr true_type kYes{};
    constexpr false_type kNo{};
    constexpr bool_constant<kOverlaps> kFollows{};
    auto& state = stages.state;  // of the next key tile
    typename Geometry::Mask mask(geometry, warpgroup);
    mask.set(work);
    auto frag_q = operand_q<Traits>(smem.q, warpgroup);
    auto frag_dout = operand_q<Traits>(smem.q + Storage::kQueryElements, warpgroup);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_k<Traits>(smem.v);
    auto frag_kt = operand_v<Traits>(smem.k);
    Weights<Traits> dscores;  // of the tile at `place`, where they have not met their keys yet
    Place place;

    auto issue_gradient = [&] {
      issue_mma<true, Traits::kTileK / 16>(MmaPV{}, dscores, frag_kt(_, _, _, place.index), output);
    };
    auto finish_gradient = [&] {
      issue_gradient();
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_k.release(place);
    };
    // The i-th tile, and, where it follows one whose gradients are at hand, their product.
    auto step = [&](int i, auto masked, auto follows) {
      constexpr bool kMasked = decltype(masked)::value;
      constexpr bool kFollowing = decltype(follows)::value;
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      auto dweights = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      if constexpr (kFollowing) {
        issue_gradient();
      }
      [[maybe_unused]] Place const previous = place;
      stages.enter(walk, i);
      place = state;
      stages.wait(smem.ring_k, walk, i, place);
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_q, frag_k(_, _, _, place.index), scores);
      if constexpr (kFollowing) {
        warpgroup_wait<1>();
        warpgroup_fence_operand(output);
        smem.ring_k.release(previous);
      }
      stages.wait(smem.ring_v, walk, i, place);
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_dout, frag_v(_, _, _, place.index),
                                            dweights);
      [[maybe_unused]] typename Geometry::Mask::Seen seen;
      if constexpr (kMasked) {
        seen = mask.look_up(work, geometry.mask_place(walk, i, place));
      }
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        scores(n) = exp2_approx(
            fmaf(scores(n), rows.scale_log2, -rows.lse_log2[AccumulatorPosition::row_of(n)]));
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(dweights);
      smem.ring_v.release(place);
      CUTE_UNROLL
      for (int n = 0; n < size(scores); ++n) {
        float const dscore =
            scores(n) * (dweights(n) - rows.delta[AccumulatorPosition::row_of(n)]);
        if constexpr (kMasked) {
          scores(n) = mask.sees(seen, n) ? dscore : 0.f;
        } else {
          scores(n) = dscore;
        }
      }
      convert_into(scores, dscores);
      state.advance();
      if constexpr (!kOverlaps) {
        finish_gradient();
      }
    };

    int i = 0;
    bool follows = false;  // whether gradients are at hand
    auto first_step = [&](auto masked) {
      step(i++, masked, kNo);
      follows = kOverlaps;
    };
    if constexpr (kNeeded) {
      // Whether the next tile is for other warpgroups alone; it is then passed over.
      auto is_for_others = [&] {
        smem.ring_k.wait(state);
        if (geometry.needs(warpgroup, state)) {
          return false;
        }
        if (follows) {
          finish_gradient();
          follows = false;
        }
        smem.ring_k.release(state);
        smem.ring_v.wait(state);
        smem.ring_v.release(state);
        state.advance();
        return true;
      };
      CUTE_NO_UNROLL
      while (i < walk.num_partial) {
        if (is_for_others()) {
          ++i;
        } else if (follows) {
          step(i++, kYes, kFollows);
        } else {
          first_step(kYes);
        }
      }
      if (i < tiles && !follows) {
        first_step(kNo);
      }
      CUTE_NO_UNROLL
      for (; i < tiles; ++i) {
        step(i, kNo, kFollows);
      }
    } else {
      // Masked tiles, some without a mask, and, where the walk says so, masked ones.
      WholeStages whole{walk.num_partial, tiles};
      if constexpr (kByWalk) {
        whole = walk.whole;
      }
      if (i < whole.begin || i >= whole.end) {
        first_step(kYes);
      } else {
        first_step(kNo);
      }
      int masked_end = whole.begin;
      CUTE_NO_UNROLL
      while (i < tiles) {
        CUTE_NO_UNROLL
        for (; i < masked_end; ++i) {
          step(i, kYes, kFollows);
        }
        CUTE_NO_UNROLL
        for (; i < whole.end; ++i) {
          step(i, kNo, kFollows);
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
  }
};

}  // namespace sparse_fmha::sm90
