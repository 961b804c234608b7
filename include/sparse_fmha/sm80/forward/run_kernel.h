// The kernel of query tiles, and the common part of every launch.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/cuda/schedule.h"
#include "sparse_fmha/sm80/forward/kernel_params.h"

namespace sparse_fmha::sm80 {

// One thread block computes one query tile.
template <class Traits, class Geometry, class Mechanism>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_kernel(KernelParams<Geometry, Mechanism> const __grid_constant__ params) {
  extern __shared__ __align__(128) char raw_smem[];
  auto& smem = *reinterpret_cast<typename Traits::template Storage<Geometry>*>(raw_smem);
  Geometry const geometry{params, smem.geometry};
  device::WorkTile const tile = params.scheduler.decode(static_cast<int32_t>(blockIdx.x));
  auto const work = geometry.begin(tile);
  typename Traits::template Body<Geometry, Mechanism>{params, smem, geometry, work}.run(tile);
}

// The number of heads whose tiles are computed side by side: as many as keep in a part of the L2
// cache what the blocks of a head share, which takes `bytes`.
inline int32_t heads_in_l2(double bytes) {
  return static_cast<int32_t>(std::clamp(l2_cache_bytes() / 2.0 / bytes, 1.0, 16.0));
}
// Of query tiles, which share keys and values of `keys` tokens.
inline int32_t heads_side_by_side(FmhaProblem const& p, double keys) {
  return heads_in_l2(4.0 * keys * p.head_dim * p.heads_kv / p.heads_q);
}

// Launches a block for each tile of the scheduler.
template <class Traits, int kSmemBytes, class Params>
void launch_tiles(void (*kernel)(Params), Params const& params, ExecutionContext const& context) {
  static_assert(kSmemBytes <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a block");
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  kernel<<<params.scheduler.num_tiles, Traits::kThreads, kSmemBytes,
           static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), "launching the attention kernel");
}

// Fills in the parameters that do not depend on the geometry, and launches a block for each query
// tile. `keys`: tokens of a head.
template <class Traits, class Geometry, class Mechanism>
void run_kernel(KernelParams<Geometry, Mechanism>& params, FmhaProblem const& p, int32_t q_tiles,
                int64_t keys, ExecutionContext const& context) {
  params.q = p.q;
  params.k = p.k;
  params.v = p.v;
  if constexpr (Traits::kPass == Pass::kForward) {
    params.out = p.out.data;
  } else {
    params.out = p.gradients->q.data;
    params.dout = p.gradients->out;
    params.terms = reinterpret_cast<float4 const*>(p.gradients->row_terms);
  }
  params.lse = p.lse;
  params.head_dim = p.head_dim;
  params.heads_q = p.heads_q;
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  if (params.negate && Traits::kPass != Pass::kForward) {  // which negates queries
    params.scale_log2 = -params.scale_log2;
  }
  params.key_bias = p.key_bias;
  params.exponent_scale = p.key_bias.data != nullptr ? 1.f : params.scale_log2;
  params.scheduler =
      make_scheduler(p.heads_q, p.batch, q_tiles,
                     heads_side_by_side(p, static_cast<double>(std::max<int64_t>(keys, 1))));
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts), p.heads_q};

  auto* const kernel = &attention_kernel<Traits, Geometry, Mechanism>;
  launch_tiles<Traits, sizeof(typename Traits::template Storage<Geometry>)>(kernel, params,
                                                                            context);
}

}  // namespace sparse_fmha::sm80
