// How a thread block of the forward kernel computes its query tile.
//
// The structure is that of FlashAttention-2: every warp computes its rows against all key tiles,
// and all threads copy the next tile while the current one is computed. With two stages, keys and
// values of the next tile are copied while the current one is computed, and there is one barrier
// per tile. With one stage, values are copied under Q.K, and the next keys under P.V, where
// fewer registers are in use.
#pragma once

#include <new>

#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/kernel_params.h"
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
  Work const& first_work;  // in registers; too many for the main loop, so it reads a copy

  __device__ __forceinline__ void run(WorkTile const& tile) {
    using namespace cute;
    int const group = __shfl_sync(0xffffffff, threadIdx.x / 32, 0) * Traits::kWarpRows / 64;
    geometry.place(first_work, 0);
    geometry.place(first_work, 1);
    copy_queries();
    cp_async_fence();
    if (threadIdx.x == 0) {
      new (smem.work) Work(first_work);
    }
    __syncthreads();  // tile 0 and tile 1 are placed
    geometry.write_mask(work(), 0);
    if constexpr (!Traits::kQueriesFirst) {
      copy_first_tile();
    }
    cp_async_wait<Traits::kQueriesFirst ? 0 : 1>();
    __syncthreads();  // the queries have landed
    if (params.negate) {
      negate_queries();
      __syncthreads();
    }
    Queries<Traits> const queries(smem.queries(), first_row());
    if constexpr (Traits::kQueriesFirst) {
      __syncthreads();  // the queries are read
      copy_first_tile();
    }

    auto softmax = each_row_tile<OnlineSoftmax>(params.scale_log2);
    Output<Traits> output;
    CUTE_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      clear(output[m]);
    }
    std::conditional_t<Traits::kVotes, TileVote, NoVote> vote(
        params.skip, tile, params.scale_log2, first_row() / 64,
        [&](int r) { return geometry.out_row(work(), row_of(0) + 8 * r) >= 0; });

    CUTE_NO_UNROLL
    for (int i = 0; i < tiles(); ++i) {
      cp_async_wait<0>();
      // Tile i has landed (only its keys, with one stage) and its mask is written. The other stage
      // (the values', with one) is no longer read.
      __syncthreads();
      if constexpr (kAhead) {
        if (i + 1 < tiles()) {
          copy_keys(i + 1);
          copy_values(i + 1);
        }
      } else {
        copy_values(i);
      }
      cp_async_fence();
      geometry.place(work(), i + 2);
      if (i + 1 < tiles()) {
        geometry.write_mask(work(), i + 1);
      }

      if (!geometry.needs(work(), i, group)) {
        between_products(i);
        continue;
      }
      Scores<Traits> scores;
      multiply_keys<Traits>(queries, smem.keys(stage_of(i)), scores);
      hide(i, scores);
      Weights<Traits> weights[Traits::kRowTiles];
      bool const kept = weigh(scores, softmax, vote, output, weights);
      between_products(i);
      if (kept) {
        multiply_values<Traits>(weights, smem.values(stage_of(i)), output);
      }
    }
    if constexpr (Traits::kVotes) {
      vote.add_to(params.skip, tile);
    }
    __syncthreads();  // the tiles are no longer read
    CUTE_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      float rescale[kRowsPerThread];
      float lse[kRowsPerThread];
      softmax[m].finish(rescale, lse);
      rescale_rows(output[m], rescale);
      store_tile<Traits>(params, geometry, work(), smem.tiles, first_row() + 16 * m, output[m],
                         lse);
    }
  }

 private:
  __device__ __forceinline__ Work const& work() const {
    return *reinterpret_cast<Work const*>(smem.work);
  }
  __device__ __forceinline__ int tiles() const { return geometry.tiles(work()); }

  // An object for each of the warp's row tiles.
  template <class Object>
  static __device__ __forceinline__ cute::array<Object, Traits::kRowTiles> each_row_tile(
      float argument) {
    if constexpr (Traits::kRowTiles == 1) {
      return {Object(argument)};
    } else {
      return {Object(argument), Object(argument)};
    }
  }
  // The warp's first row in the query tile.
  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x / 32) * Traits::kWarpRows;
  }
  // The first of a thread's two rows of a row tile.
  static __device__ __forceinline__ int row_of(int m) {
    return first_row() + 16 * m + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int stage_of(int i) { return kAhead ? i % 2 : 0; }

  // With one stage: waits for the values, and copies the next keys to the place of the last ones.
  __device__ __forceinline__ void between_products(int i) const {
    if constexpr (!kAhead) {
      cute::cp_async_wait<0>();
      __syncthreads();
      if (i + 1 < tiles()) {
        copy_keys(i + 1);
      }
      cute::cp_async_fence();
    }
  }
  __device__ __forceinline__ void copy_queries() const {
    copy_tile<Traits, Traits::kTileQ>(smem.queries(), geometry.queries(first_work, params.q),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  // The part of it that the main loop does not copy.
  __device__ __forceinline__ void copy_first_tile() const {
    if (tiles() > 0) {
      copy_keys(0);
      if constexpr (kAhead) {
        copy_values(0);
      }
    }
    cute::cp_async_fence();
  }
  __device__ __forceinline__ void copy_keys(int i) const {
    copy_tile<Traits, Traits::kTileK>(smem.keys(stage_of(i)), geometry.keys(work(), i),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ void copy_values(int i) const {
    copy_tile<Traits, Traits::kTileK>(smem.values(stage_of(i)), geometry.values(work(), i),
                                      static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ void negate_queries() const {
    auto* const pairs = reinterpret_cast<uint32_t*>(smem.queries());
    for (int i = threadIdx.x; i < Traits::kQueryElements / 2; i += Traits::kThreads) {
      pairs[i] ^= 0x80008000u;
    }
  }

  __device__ __forceinline__ void hide(int i, Scores<Traits>& scores) const {
    if (!geometry.is_masked(work(), i)) {
      return;
    }
    CUTE_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      typename Geometry::Mask const mask(geometry, work(), row_of(m));
      auto const seen = mask.look_up(i);
      hide_scores(scores[m], hidden_by(mask, seen));
    }
  }

  // Computes the weights of a tile and rescales the output so far. Returns false if the tile is
  // skipped.
  template <class Softmax, class Vote>
  static __device__ __forceinline__ bool weigh(Scores<Traits>& scores, Softmax& softmax, Vote& vote,
                                               Output<Traits>& output,
                                               Weights<Traits> (&weights)[Traits::kRowTiles]) {
    CUTE_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      float rescale[kRowsPerThread];
      bool moved;
      if constexpr (Traits::kVotes) {
        float high[kRowsPerThread];
        OnlineSoftmax::own_tops(scores[m], high);
        if (vote.template leaves_out<true>(high)) {
          return false;
        }
        OnlineSoftmax::share_tops(high);
        vote.keep(high);
        moved = softmax[m].template update<true>(scores[m], high, rescale);
      } else {
        moved = softmax[m].template update<true>(scores[m], rescale);
      }
      weights[m].take(scores[m]);
      if (moved) {
        rescale_rows(output[m], rescale);
      }
    }
    return true;
  }
};

}  // namespace sparse_fmha::sm80
