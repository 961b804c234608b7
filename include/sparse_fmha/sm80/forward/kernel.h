// How a thread block of the forward kernel computes its query tile.
//
// The structure is that of FlashAttention-2: every warp computes 16 rows against all key tiles, and
// all threads copy the next tile while the current one is computed. With two stages, keys and
// values of the next tile are copied while the current one is computed, and there is one barrier
// per tile. With one stage, values are copied under Q.K and the next keys under P.V.
#pragma once

#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/kernel_params.h"
#include "sparse_fmha/sm80/forward/key_bias.h"
#include "sparse_fmha/sm80/forward/products.h"
#include "sparse_fmha/sm80/forward/store_tile.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Geometry, class Mechanism>
struct Attention {
  using Element = typename Traits::Element;
  using Work = typename Geometry::Work;
  using Storage = SharedStorage<Traits, Geometry>;
  static constexpr bool kAhead = Traits::kStages == 2;  // a whole tile is copied ahead

  KernelParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const& geometry;
  Work const& work;

  __device__ __forceinline__ void run(WorkTile const& tile) {
    using namespace cute;
    int const tiles = geometry.tiles(work);
    int const group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (has_biases() && threadIdx.x == 0) {
      smem.biases.choose_head(params.key_bias, tile);
    }
    geometry.place(work, 0);
    geometry.place(work, 1);
    copy_queries();
    cp_async_fence();
    __syncthreads();  // tile 0 and tile 1 are placed
    geometry.write_mask(work, 0);
    if (tiles > 0) {
      copy_biases(0);
      copy_keys(0);
      if constexpr (kAhead) {
        copy_values(0);
      }
    }
    cp_async_fence();
    cp_async_wait<1>();
    __syncthreads();  // the queries have landed
    if (params.negate) {
      negate_queries();
      __syncthreads();
    }
    Queries<Traits> const queries(smem.queries());

    OnlineSoftmax softmax(params.exponent_scale);
    auto output = make_tensor<float>(Shape<Int<Traits::kHeadDim / 2>>{});
    clear(output);
    typename Geometry::Mask const mask(geometry, work, group * 64 + AccumulatorPosition().row);
    std::conditional_t<Traits::kVotes, TileVote, NoVote> vote(
        params.skip, tile, softmax.scale_log2, group, [&](int r) {
          return geometry.out_row(work, group * 64 + AccumulatorPosition().row + 8 * r) >= 0;
        });

    CUTE_NO_UNROLL
    for (int i = 0; i < tiles; ++i) {
      cp_async_wait<0>();
      // Tile i has landed (only its keys, with one stage) and its mask is written. The other stage
      // (the values', with one) is no longer read.
      __syncthreads();
      if (i + 1 < tiles) {
        copy_biases(i + 1);
      }
      if constexpr (kAhead) {
        if (i + 1 < tiles) {
          copy_keys(i + 1);
          copy_values(i + 1);
        }
      } else {
        copy_values(i);
      }
      cp_async_fence();
      geometry.place(work, i + 2);
      if (i + 1 < tiles) {
        geometry.write_mask(work, i + 1);
      }

      Weights<Traits> weights;
      bool const has_weights =
          geometry.needs(work, i, group) && weigh(i, queries, mask, softmax, vote, output, weights);
      if constexpr (!kAhead) {
        cp_async_wait<0>();
        __syncthreads();  // the values have landed, and the keys are no longer read
        if (i + 1 < tiles) {
          copy_keys(i + 1);
        }
        cp_async_fence();
      }
      if (has_weights) {
        multiply_values<Traits>(weights, smem.values(stage_of(i)), output);
      }
    }
    if constexpr (Traits::kVotes) {
      vote.add_to(params.skip, tile);
    }
    float rescale[kRowsPerThread];
    float lse[kRowsPerThread];
    softmax.finish(rescale, lse);
    rescale_rows(output, rescale);
    __syncthreads();  // the tiles are no longer read
    store_tile<Traits>(params, geometry, work, smem.tiles, output, lse);
  }

 private:
  static __device__ __forceinline__ int stage_of(int i) { return kAhead ? i % 2 : 0; }

  __device__ __forceinline__ void copy_queries() const {
    copy_tile<Traits, Traits::kTileQ>(smem.queries(), geometry.queries(work, params.q),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ void copy_keys(int i) const {
    copy_tile<Traits, Traits::kTileK>(smem.keys(stage_of(i)), geometry.keys(work, i),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ void copy_values(int i) const {
    copy_tile<Traits, Traits::kTileK>(smem.values(stage_of(i)), geometry.values(work, i),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ bool has_biases() const { return params.key_bias.data != nullptr; }
  __device__ __forceinline__ void copy_biases(int i) const {
    if (has_biases()) {
      smem.biases.template copy<Traits>(smem.biases.head, i,
                                        [&](int r) { return geometry.key_index(work, i, r); });
    }
  }
  template <class Scores>
  __device__ __forceinline__ void add_biases(Scores& scores, int i) const {
    visit_biases<Traits::kTileK>(smem.biases.tile(i) + AccumulatorPosition().column,
                                 [&](int n, float const(&bias)[2]) {
                                   CUTE_UNROLL
                                   for (int j = 4 * n; j < 4 * n + 4; ++j) {
                                     scores(j) = biased(scores(j), params.scale_log2, bias[j % 2]);
                                   }
                                 });
  }
  __device__ __forceinline__ void negate_queries() const {
    auto* const pairs = reinterpret_cast<uint32_t*>(smem.queries());
    for (int i = threadIdx.x; i < Traits::kQueryElements / 2; i += Traits::kThreads) {
      pairs[i] ^= 0x80008000u;
    }
  }

  // Computes the weights of tile i and rescales the output so far. Returns false if the tile is
  // skipped.
  template <class Mask, class Vote, class Output>
  __device__ __forceinline__ bool weigh(int i, Queries<Traits> const& queries, Mask const& mask,
                                        OnlineSoftmax& softmax, Vote& vote, Output& output,
                                        Weights<Traits>& weights) const {
    auto scores = cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kTileK / 2>>{});
    multiply_keys<Traits>(queries, smem.keys(stage_of(i)), scores);
    if (has_biases()) {
      add_biases(scores, i);
    }
    if (geometry.is_masked(work, i)) {
      auto const seen = mask.look_up(i);
      hide_scores(scores, hidden_by(mask, seen));
    }
    float rescale[kRowsPerThread];
    bool moved;
    if constexpr (Traits::kVotes) {
      float high[kRowsPerThread];
      OnlineSoftmax::row_tops(scores, high);
      if (vote.template leaves_out<true>(high)) {
        return false;
      }
      moved = softmax.template update<true>(scores, high, rescale);
    } else {
      moved = softmax.template update<true>(scores, rescale);
    }
    weights.take(scores);
    if (moved) {
      rescale_rows(output, rescale);
    }
    return true;
  }
};

}  // namespace sparse_fmha::sm80
