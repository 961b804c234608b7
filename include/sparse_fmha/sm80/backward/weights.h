// From scores to weights, and from gradients of the weights to those of the scores.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm80/backward/products.h"

namespace sparse_fmha::sm80 {

// Replaces hidden scores by what makes their weights zero.
template <class Traits, class Geometry, class Work>
__device__ __forceinline__ void hide_scores(Geometry const& geometry, Work const& work,
                                            WarpPart<Traits> const& warp, int i, float hidden,
                                            Sums<Traits::kBlocks, Traits::kWarpColumns>& scores) {
  CUTE_UNROLL
  for (int b = 0; b < Traits::kBlocks; ++b) {
    typename Geometry::Mask const mask(geometry, work, warp.thread_row(b));
    auto seen = mask.look_up(i);
    if constexpr (Traits::kSharing > 1) {
      seen.pass_over(warp.columns * Traits::kWarpColumns);
    }
    CUTE_UNROLL
    for (int j = 0; j < Traits::kWarpColumns / 2; ++j) {
      float& score = scores.at[b][j / 4][j % 4];
      score = mask.sees(seen, j) ? score : hidden;
    }
  }
}

// Replaces the scores of tile i by weights, and the gradients of the weights by those of the
// scores, without the scale. lse_of and delta_of are given a block and the index of an element.
// scale_log2 is not zero.
template <class Traits, class Geometry, class Work, class LseOf, class DeltaOf>
__device__ __forceinline__ void differentiate(Geometry const& geometry, Work const& work,
                                              WarpPart<Traits> const& warp, int i, bool masked,
                                              float scale_log2, LseOf const& lse_of,
                                              DeltaOf const& delta_of,
                                              Sums<Traits::kBlocks, Traits::kWarpColumns>& scores,
                                              Sums<Traits::kBlocks, Traits::kWarpColumns>& grads) {
  auto each = [&](auto masked) {
    grads.visit([&](float& grad, int block, int j) {
      float& weight = scores.at[block][j / 4][j % 4];
      weight = exp2_approx(fmaf(weight, scale_log2, -lse_of(block, j)));
      grad = weight * (grad - delta_of(block, j));
      if constexpr (decltype(masked)::value) {
        // A select, not only a multiplication by zero: a hidden value may be infinite.
        grad = weight == 0.f ? 0.f : grad;
      }
    });
  };
  if (masked) {
    hide_scores(geometry, work, warp, i, scale_log2 > 0 ? -INFINITY : INFINITY, scores);
    each(cute::true_type{});
  } else {
    each(cute::false_type{});
  }
}

// The same in two parts, where the gradients of the weights are computed between them: fewer
// numbers are in use at a time. Replaces scores by weights.
template <class Traits, class Geometry, class Work, class LseOf>
__device__ __forceinline__ void weigh(Geometry const& geometry, Work const& work,
                                      WarpPart<Traits> const& warp, int i, bool masked,
                                      float scale_log2, LseOf const& lse_of,
                                      Sums<Traits::kBlocks, Traits::kWarpColumns>& scores) {
  if (masked) {
    hide_scores(geometry, work, warp, i, scale_log2 > 0 ? -INFINITY : INFINITY, scores);
  }
  scores.visit([&](float& weight, int block, int j) {
    weight = exp2_approx(fmaf(weight, scale_log2, -lse_of(block, j)));
  });
}
// Replaces gradients of the weights by those of the scores, without the scale.
template <class Scores, class DeltaOf>
__device__ __forceinline__ void differentiate_weights(Scores const& weights, bool masked,
                                                      DeltaOf const& delta_of, Scores& grads) {
  grads.visit([&](float& grad, int block, int j) {
    grad = weights.at[block][j / 4][j % 4] * (grad - delta_of(block, j));
  });
  if (masked) {  // a hidden value may be infinite
    grads.visit([&](float& grad, int block, int j) {
      grad = weights.at[block][j / 4][j % 4] == 0.f ? 0.f : grad;
    });
  }
}

}  // namespace sparse_fmha::sm80
