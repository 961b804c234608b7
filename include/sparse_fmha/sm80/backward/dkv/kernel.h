// How a thread block of the dK/dV kernel computes its key tile: against every query tile that sees
// it, for each query head of the group in turn.
//
// Scores are keys by queries: S^T = K Q^T, P^T = exp2(scale * log2(e) * S^T - lse), dP^T = V dO^T,
// dS^T = P^T * (dP^T - delta). dV is the sum of P^T dO, and dK the scale times that of dS^T Q.
#pragma once

#include "sparse_fmha/sm80/backward/dkv/kernel_params.h"
#include "sparse_fmha/sm80/backward/store_sums.h"
#include "sparse_fmha/sm80/backward/weights.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Geometry, class Mechanism>
struct DkvTile {
  using Element = typename Traits::Element;
  using Work = typename Geometry::Work;
  using Storage = BackwardStorage<Traits, Geometry>;
  using Scores = Sums<Traits::kBlocks, Traits::kWarpColumns>;
  static constexpr bool kAhead = Traits::kStages == 2;  // dO is copied a whole step ahead

  DkvParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const& geometry;
  Work const& work;

  __device__ __forceinline__ void run() {
    using namespace cute;
    int const steps = geometry.steps(work);
    WarpPart<Traits> const warp;
    geometry.place(work, 0);
    geometry.place(work, 1);
    copy<Traits::kRows>(smem.stay(0), geometry.keys(work, params.k));
    copy<Traits::kRows>(smem.stay(1), geometry.keys(work, params.v));
    cp_async_fence();
    cp_async_wait<0>();
    __syncthreads();  // keys and values have landed; steps 0 and 1 are placed
    StayingRows<Traits, Traits::kHeld != Held::kNone> const keys(smem.stay(0), warp);
    StayingRows<Traits, Traits::kHeld == Held::kBoth> const values(smem.stay(1), warp);
    if (steps > 0) {
      geometry.write_mask(work, 0);
    }
    if constexpr (Traits::kHeld != Held::kNone) {
      __syncthreads();  // what is held now was where the stages are
    }
    if (steps > 0) {
      copy_queries(0);
      copy_douts(0);
    }
    cp_async_fence();
    Factor<Traits> weights_t(smem.factor(0), warp);
    Factor<Traits> dscores_t(smem.factor(1), warp);
    Sums<Traits::kBlocks, Traits::kWarpDim> dk;
    Sums<Traits::kBlocks, Traits::kWarpDim> dv;
    dk.clear();
    dv.clear();

    CUTE_NO_UNROLL
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<0>();
      // Step i has landed and its mask is written. The other stage is no longer read.
      __syncthreads();
      if (i + 1 < steps) {
        copy_queries(i + 1);
        if constexpr (kAhead) {
          copy_douts(i + 1);
        }
      }
      cp_async_fence();
      geometry.place(work, i + 2);
      if (i + 1 < steps) {
        geometry.write_mask(work, i + 1);
      }

      bool const needed = geometry.needs(work, i, warp.first_row());
      if (needed) {
        Scores scores;
        Scores grads;
        // Two columns next to each other: lse, delta, lse, delta.
        auto const* const terms = reinterpret_cast<float4 const*>(
            smem.terms + i % 2 * Traits::kColumns + warp.columns * Traits::kWarpColumns +
            warp.lane % 4 * 2);
        multiply_rows<Traits>(keys, smem.pass(0, i % 2), warp, scores);
        multiply_rows<Traits>(values, douts(i), warp, grads);
        auto const lse_of = [&](int /*block*/, int j) {
          return j % 2 == 0 ? terms[j / 4 * 4].x : terms[j / 4 * 4].z;
        };
        auto const delta_of = [&](int /*block*/, int j) {
          return j % 2 == 0 ? terms[j / 4 * 4].y : terms[j / 4 * 4].w;
        };
        differentiate<Traits>(geometry, work, warp, i,
                              geometry.is_masked(work, i, warp.first_row()), params.scale_log2,
                              lse_of, delta_of, scores, grads);
        weights_t.put(scores);
        dscores_t.put(grads);
        warp.sync();
        multiply_columns(weights_t, douts(i), warp, dv);
      }
      if constexpr (!kAhead) {
        __syncthreads();  // dO is no longer read
        if (i + 1 < steps) {
          copy_douts(i + 1);
        }
        cp_async_fence();
      }
      if (needed) {
        multiply_columns(dscores_t, smem.pass(0, i % 2), warp, dk);
      }
    }
    __syncthreads();  // the tiles are no longer read
    auto const row_of = [&](int r) { return geometry.key_row(work, r); };
    store_sums(dv, 1.f, smem.tiles, warp, params.dv, params.head_dim, row_of);
    store_sums(dk, params.scale, smem.tiles + Traits::kStayElements, warp, params.dk,
               params.head_dim, row_of);
  }

 private:
  __device__ __forceinline__ Element* douts(int i) const {
    return smem.pass(1, kAhead ? i % 2 : 0);
  }
  template <int kRows, class Rows>
  __device__ __forceinline__ void copy(Element* to, Rows const& rows) const {
    copy_tile<Traits, kRows>(to, rows, static_cast<Element const*>(params.q.data), params.head_dim);
  }
  // Terms that are zero make a weight of 1 for a row of zeros, which adds nothing.
  __device__ __forceinline__ void copy_queries(int i) const {
    copy<Traits::kColumns>(smem.pass(0, i % 2), geometry.queries(work, i));
    for (int r = threadIdx.x; r < Traits::kColumns; r += Traits::kThreads) {
      int64_t const index = geometry.query_row(work, i, r);
      cutlass::arch::cp_async_zfill<8, cutlass::arch::CacheOperation::Always>(
          smem.terms + i % 2 * Traits::kColumns + r, params.terms + (index < 0 ? 0 : index),
          index >= 0);
    }
  }
  __device__ __forceinline__ void copy_douts(int i) const {
    copy<Traits::kColumns>(douts(i), geometry.douts(work, i));
  }
};

template <class Traits, class Geometry, class Mechanism>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_kernel_dkv(DkvParams<Geometry, Mechanism> const __grid_constant__ params) {
  extern __shared__ __align__(128) char raw_smem[];
  auto& smem = *reinterpret_cast<BackwardStorage<Traits, Geometry>*>(raw_smem);
  Geometry const geometry{params, smem.geometry};
  auto const work = geometry.begin(params.scheduler.decode(static_cast<int32_t>(blockIdx.x)));
  DkvTile<Traits, Geometry, Mechanism>{params, smem, geometry, work}.run();
}

}  // namespace sparse_fmha::sm80
