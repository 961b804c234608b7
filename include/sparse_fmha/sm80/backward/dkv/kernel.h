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
#include "sparse_fmha/sm80/forward/key_bias.h"

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
    for (int r = threadIdx.x; r < Traits::kRows * Traits::kSharing; r += Traits::kThreads) {
      smem.biases.sums[r / Traits::kRows][r % Traits::kRows] = 0.f;
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
        if (has_biases()) {
          add_biases(scores, warp, i);
        }
        auto const lse_of = [&](int /*block*/, int j) {
          return j % 2 == 0 ? terms[j / 4 * 4].x : terms[j / 4 * 4].z;
        };
        auto const delta_of = [&](int /*block*/, int j) {
          return j % 2 == 0 ? terms[j / 4 * 4].y : terms[j / 4 * 4].w;
        };
        differentiate<Traits>(geometry, work, warp, i,
                              geometry.is_masked(work, i, warp.first_row()), has_biases(),
                              params.exponent_scale, lse_of, delta_of, scores, grads);
        weights_t.put(scores);
        dscores_t.put(grads);
        if (params.bias_gradients != nullptr) {
          add_bias_gradients(grads, warp);
        }
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
      if (params.bias_gradients != nullptr &&
          (i + 1 == steps || geometry.head(work, i + 1) != geometry.head(work, i))) {
        store_bias_gradients(warp, geometry.head(work, i));
      }
    }
    __syncthreads();  // the tiles are no longer read
    auto const row_of = [&](int r) { return geometry.key_row(work, r); };
    store_sums(dv, 1.f, smem.tiles, warp, params.dv, params.head_dim, row_of);
    store_sums(dk, params.scale, smem.tiles + Traits::kStayElements, warp, params.dk,
               params.head_dim, row_of);
  }

 private:
  __device__ __forceinline__ bool has_biases() const { return params.key_bias.data != nullptr; }
  // Every thread reads those of its own keys, again for each step: registers are scarce.
  __device__ __forceinline__ void add_biases(Scores& scores, WarpPart<Traits> const& warp,
                                             int i) const {
    TokenNumbers const& from = params.key_bias;
    float const* const head =
        from.data + work.batch * from.batch_stride + geometry.head(work, i) * from.head_stride;
    CUTE_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) {
      float bias[kRowsPerThread];
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        int64_t const index = geometry.key_index(work, warp.thread_row(b) + 8 * r);
        bias[r] = index >= 0 ? bias_in_log2(__ldg(head + index)) : 0.f;
      }
      CUTE_UNROLL
      for (int j = 0; j < Traits::kWarpColumns / 2; ++j) {
        float& score = scores.at[b][j / 4][j % 4];
        score = biased(score, params.scale_log2, bias[AccumulatorPosition::row_of(j)]);
      }
    }
  }
  // The gradients of biases are those of the scores, before the scale. Four threads have the
  // columns of a key.
  __device__ __forceinline__ void add_bias_gradients(Scores const& grads,
                                                     WarpPart<Traits> const& warp) const {
    CUTE_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) {
      float sum[kRowsPerThread] = {};
      CUTE_UNROLL
      for (int j = 0; j < Traits::kWarpColumns / 2; ++j) {
        sum[AccumulatorPosition::row_of(j)] += grads.at[b][j / 4][j % 4];
      }
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        float const of_row = reduce_quad(sum[r], [](float x, float y) { return x + y; });
        if (warp.lane % 4 == 0) {
          smem.biases.sums[warp.columns][warp.thread_row(b) + 8 * r] += of_row;
        }
      }
    }
  }
  // After the last step of a head: its sums, which begin again.
  __device__ __forceinline__ void store_bias_gradients(WarpPart<Traits> const& warp,
                                                       int32_t head) const {
    warp.sync();
    if (warp.columns > 0) {
      return;  // until all threads meet at the next step
    }
    float* const to =
        params.bias_gradients + (int64_t{work.batch} * params.heads_q + head) * params.keys;
    for (int r = warp.first_row() + warp.lane; r < warp.first_row() + Traits::kWarpRows; r += 32) {
      float sum = 0.f;
      CUTE_UNROLL
      for (int part = 0; part < Traits::kSharing; ++part) {
        sum += smem.biases.sums[part][r];
        smem.biases.sums[part][r] = 0.f;
      }
      int64_t const index = geometry.key_index(work, r);
      if (index >= 0) {
        to[index] = sum;
      }
    }
  }
  __device__ __forceinline__ Element* douts(int i) const {
    return smem.pass(1, kAhead ? i % 2 : 0);
  }
  template <int kRows, class Rows>
  __device__ __forceinline__ void copy(Element* to, Rows const& rows) const {
    copy_tile<Traits, kRows>(to, rows, static_cast<Element const*>(params.q.data), params.head_dim);
  }
  // A bias may be infinite in the units of weights, so rows that do not exist have weight 0.
  __device__ __forceinline__ void copy_queries(int i) const {
    copy<Traits::kColumns>(smem.pass(0, i % 2), geometry.queries(work, i));
    for (int r = threadIdx.x; r < Traits::kColumns; r += Traits::kThreads) {
      int64_t const index = geometry.query_row(work, i, r);
      float2* const to = smem.terms + i % 2 * Traits::kColumns + r;
      if (index < 0) {
        *to = make_float2(INFINITY, 0.f);
      } else {
        cutlass::arch::cp_async<8, cutlass::arch::CacheOperation::Always>(to, params.terms + index);
      }
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
