// What the kernels of key tiles share: a thread block has a key tile, against every query tile that
// sees it, for each query head of the group in turn.
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
struct DkvBlock {
  using Element = typename Traits::Element;
  using Work = typename Geometry::Work;
  using Storage = BackwardStorage<Traits, Geometry>;
  using Scores = Sums<Traits::kBlocks, Traits::kWarpColumns>;
  using Gradient = Sums<Traits::kBlocks, Traits::kWarpDim>;
  static constexpr bool kAhead = Traits::kStages == 2;            // dO is copied a whole step ahead
  static constexpr bool kFirstAhead = Traits::kFirstStages == 2;  // and Q is

  DkvParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const& geometry;
  Work const& work;

  // Places steps 0 and 1, and starts the copies of keys and values.
  __device__ __forceinline__ void copy_keys() const {
    geometry.place(work, 0);
    geometry.place(work, 1);
    copy<Traits::kRows>(smem.stay(0), geometry.keys(work, params.k));
    copy<Traits::kRows>(smem.stay(1), geometry.keys(work, params.v));
    cute::cp_async_fence();
  }
  // Returns when keys and values have landed and steps 0 and 1 are placed.
  __device__ __forceinline__ void load_keys() const {
    copy_keys();
    cute::cp_async_wait<0>();
    __syncthreads();
  }
  // Copies of the first step, which begin_step() waits for.
  __device__ __forceinline__ void copy_first(int steps) const {
    if (steps > 0) {
      copy_queries(0);
      copy_douts(0);
    }
    cute::cp_async_fence();
  }
  // Step i has landed and its mask is written. Starts the copies of the next one.
  __device__ __forceinline__ void begin_step(int i, int steps) const {
    cute::cp_async_wait<0>();
    __syncthreads();  // the other stage is no longer read
    if constexpr (kFirstAhead) {
      if (i + 1 < steps) {
        copy_queries(i + 1);
        if constexpr (kAhead) {
          copy_douts(i + 1);
        }
      }
      cute::cp_async_fence();
    }
    geometry.place(work, i + 2);
    if (i + 1 < steps) {
      geometry.write_mask(work, i + 1);
    }
  }
  // Weights, and gradients of the scores.
  template <class Keys, class Values, class Part>
  __device__ __forceinline__ void find_weights(
      int i, Keys const& keys, Values const& values, WarpPart<Part> const& warp,
      Sums<Part::kBlocks, Part::kWarpColumns>& weights,
      Sums<Part::kBlocks, Part::kWarpColumns>& dscores) const {
    // Two columns next to each other: lse, delta, lse, delta.
    auto const* const terms =
        reinterpret_cast<float4 const*>(smem.terms + i % 2 * Traits::kColumns +
                                        warp.columns * Part::kWarpColumns + warp.lane % 4 * 2);
    auto const lse_of = [&](int /*block*/, int j) {
      return j % 2 == 0 ? terms[j / 4 * 4].x : terms[j / 4 * 4].z;
    };
    // Read again: kept from the first product to the second, terms would take many registers.
    auto const* const again_terms = terms + (Traits::kAddsDq ? again(0) : 0);
    auto const delta_of = [&](int /*block*/, int j) {
      return j % 2 == 0 ? again_terms[j / 4 * 4].y : again_terms[j / 4 * 4].w;
    };
    auto const is_masked = [&] { return geometry.is_masked(work, i, warp.first_row()); };
    multiply_rows<Part>(keys, queries(i), warp, weights);
    if constexpr (Traits::kAddsDq) {
      weigh<Part>(geometry, work, warp, i, is_masked(), params.scale_log2, lse_of, weights);
      multiply_rows<Part>(values, douts(i), warp, dscores);
      differentiate_weights(weights, is_masked(), delta_of, dscores);
    } else {
      multiply_rows<Part>(values, douts(i), warp, dscores);
      differentiate<Part>(geometry, work, warp, i, is_masked(), params.scale_log2, lse_of, delta_of,
                          weights, dscores);
    }
  }
  // When the tiles are no longer read.
  __device__ __forceinline__ void store(Gradient const& dk, Gradient const& dv,
                                        WarpPart<Traits> const& warp) const {
    auto const row_of = [&](int r) { return geometry.key_row(work, r); };
    store_sums(dv, 1.f, smem.tiles, warp, params.dv, params.head_dim, row_of);
    store_sums(dk, params.scale, smem.tiles + Traits::kStayElements, warp, params.dk,
               params.head_dim, row_of);
  }

  __device__ __forceinline__ Element* queries(int i) const {
    return smem.pass(0, i % Traits::kFirstStages);
  }
  __device__ __forceinline__ Element* douts(int i) const {
    return smem.pass(1, i % Traits::kStages);
  }
  template <int kRows, class Rows>
  __device__ __forceinline__ void copy(Element* to, Rows const& rows) const {
    copy_tile<Traits, kRows>(to, rows, static_cast<Element const*>(params.q.data), params.head_dim);
  }
  // Terms that are zero make a weight of 1 for a row of zeros, which adds nothing.
  __device__ __forceinline__ void copy_queries(int i) const {
    copy<Traits::kColumns>(queries(i), geometry.queries(work, i));
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
  DkvBlock<Traits, Geometry, Mechanism> const tile{params, smem, geometry, work};
  Traits::run(tile);
}

}  // namespace sparse_fmha::sm80
