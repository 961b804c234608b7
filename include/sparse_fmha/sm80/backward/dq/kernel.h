// How a thread block of the dQ kernel computes its query tile.
//
// S = Q K^T, P = exp2(scale * log2(e) * S - lse), dP = dO V^T, dS = P * (dP - delta). dQ is the
// scale times the sum of dS K over the key tiles. A masked element of dS is zero.
#pragma once

#include "sparse_fmha/sm80/backward/store_sums.h"
#include "sparse_fmha/sm80/backward/weights.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/kernel_params.h"
#include "sparse_fmha/sm80/forward/key_bias.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Geometry, class Mechanism>
struct DqTile {
  using Element = typename Traits::Element;
  using Work = typename Geometry::Work;
  using Storage = BackwardStorage<Traits, Geometry>;
  using Scores = Sums<Traits::kBlocks, Traits::kWarpColumns>;
  static constexpr bool kAhead = Traits::kStages == 2;  // values are copied a whole tile ahead

  KernelParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const& geometry;
  Work const& work;

  __device__ __forceinline__ void run(WorkTile const& tile) {
    using namespace cute;
    int const tiles = geometry.tiles(work);
    WarpPart<Traits> const warp;
    int const group = warp.first_row() / 64;
    if (has_biases() && threadIdx.x == 0) {
      smem.biases.choose_head(params.key_bias, tile);
    }
    geometry.place(work, 0);
    geometry.place(work, 1);
    copy<Traits::kRows>(smem.stay(0), geometry.queries(work, params.q));
    copy<Traits::kRows>(smem.stay(1), geometry.queries(work, params.dout));
    cp_async_fence();
    read_terms();
    cp_async_wait<0>();
    __syncthreads();  // the queries, dO and their terms are there; tiles 0 and 1 are placed
    StayingRows<Traits, Traits::kHeld != Held::kNone> const queries(smem.stay(0), warp);
    StayingRows<Traits, Traits::kHeld == Held::kBoth> const douts(smem.stay(1), warp);
    geometry.write_mask(work, 0);
    if constexpr (Traits::kHeld != Held::kNone) {
      __syncthreads();  // what is held now was where the stages are
    }
    if (tiles > 0) {
      copy_biases(0);
      copy_keys(0);
      copy_values(0);
    }
    cp_async_fence();
    Factor<Traits> dscores(smem.factor(0), warp);
    Sums<Traits::kBlocks, Traits::kWarpDim> gradient;
    gradient.clear();

    CUTE_NO_UNROLL
    for (int i = 0; i < tiles; ++i) {
      cp_async_wait<0>();
      // Tile i has landed and its mask is written. The other stage is no longer read.
      __syncthreads();
      if (i + 1 < tiles) {
        copy_biases(i + 1);
        copy_keys(i + 1);
        if constexpr (kAhead) {
          copy_values(i + 1);
        }
      }
      cp_async_fence();
      geometry.place(work, i + 2);
      if (i + 1 < tiles) {
        geometry.write_mask(work, i + 1);
      }

      bool const needed = geometry.needs(work, i, group);
      if (needed) {
        Scores scores;
        Scores grads;
        multiply_rows<Traits>(queries, smem.pass(0, i % 2), warp, scores);
        multiply_rows<Traits>(douts, values(i), warp, grads);
        if (has_biases()) {
          add_biases(scores, warp, i);
        }
        auto const terms_of = [&](int block, int j) -> float2 const& {
          return smem.terms[warp.thread_row(block) + 8 * AccumulatorPosition::row_of(j)];
        };
        auto const lse_of = [&](int block, int j) { return terms_of(block, j).x; };
        auto const delta_of = [&](int block, int j) { return terms_of(block, j).y; };
        differentiate<Traits>(geometry, work, warp, i, geometry.is_masked(work, i), has_biases(),
                              params.exponent_scale, lse_of, delta_of, scores, grads);
        dscores.put(grads);
      }
      if constexpr (!kAhead) {
        __syncthreads();  // the values are no longer read
        if (i + 1 < tiles) {
          copy_values(i + 1);
        }
        cp_async_fence();
      }
      if (needed) {
        warp.sync();
        multiply_columns(dscores, smem.pass(0, i % 2), warp, gradient);
      }
    }
    __syncthreads();  // the tiles are no longer read
    constexpr float kLn2 = 0.69314718055994530942f;
    store_sums(gradient, params.scale_log2 * kLn2, smem.tiles, warp, params.out, params.head_dim,
               [&](int r) { return geometry.out_row(work, r); });
  }

 private:
  // Rows outside the tensor have weight 0.
  __device__ __forceinline__ void read_terms() const {
    for (int r = threadIdx.x; r < Traits::kRows; r += Traits::kThreads) {
      int64_t const index = geometry.out_row(work, r);
      smem.terms[r] = index < 0 ? make_float2(INFINITY, 0.f)
                                : __ldg(reinterpret_cast<float2 const*>(params.terms + index));
    }
  }
  __device__ __forceinline__ bool has_biases() const { return params.key_bias.data != nullptr; }
  __device__ __forceinline__ void copy_biases(int i) const {
    if (has_biases()) {
      smem.biases.template copy<Traits>(smem.biases.head, i,
                                        [&](int r) { return geometry.key_index(work, i, r); });
    }
  }
  __device__ __forceinline__ void add_biases(Scores& scores, WarpPart<Traits> const& warp,
                                             int i) const {
    float const* const biases = smem.biases.tile(i) + warp.columns * Traits::kWarpColumns;
    visit_biases<Traits::kWarpColumns>(biases + AccumulatorPosition().column,
                                       [&](int n, float const(&bias)[2]) {
                                         CUTE_UNROLL
                                         for (int b = 0; b < Traits::kBlocks; ++b) {
                                           CUTE_UNROLL
                                           for (int j = 0; j < 4; ++j) {
                                             float& score = scores.at[b][n][j];
                                             score = biased(score, params.scale_log2, bias[j % 2]);
                                           }
                                         }
                                       });
  }
  __device__ __forceinline__ Element* values(int i) const {
    return smem.pass(1, kAhead ? i % 2 : 0);
  }
  template <int kRows, class Rows>
  __device__ __forceinline__ void copy(Element* to, Rows const& rows) const {
    copy_tile<Traits, kRows>(to, rows, static_cast<Element const*>(params.q.data), params.head_dim);
  }
  __device__ __forceinline__ void copy_keys(int i) const {
    copy<Traits::kColumns>(smem.pass(0, i % 2), geometry.keys(work, i));
  }
  __device__ __forceinline__ void copy_values(int i) const {
    copy<Traits::kColumns>(values(i), geometry.values(work, i));
  }
};

template <class Config>
struct DqTraits : BackwardTraits<Config, Pass::kBackwardDq> {
  template <class Geometry, class Mechanism>
  using Body = DqTile<DqTraits, Geometry, Mechanism>;
  template <class Geometry>
  using Storage = BackwardStorage<DqTraits, Geometry>;
  template <int kRows>
  using WithTileQ = DqTraits<typename Config::template WithTileQ<kRows>>;
};

}  // namespace sparse_fmha::sm80
