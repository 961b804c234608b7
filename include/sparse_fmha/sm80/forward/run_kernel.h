// The common part of every launch.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/cuda/schedule.h"
#include "sparse_fmha/sm80/forward/kernel.h"

namespace sparse_fmha::sm80 {

// The number of heads whose query tiles are computed side by side: as many as have keys and values
// of `keys` tokens that fit in a part of the L2 cache together.
inline int32_t heads_side_by_side(FmhaProblem const& p, double keys) {
  double const bytes = 4.0 * keys * p.head_dim * p.heads_kv / p.heads_q;
  return static_cast<int32_t>(std::clamp(l2_cache_bytes() / 2.0 / bytes, 1.0, 16.0));
}

// Fills in the parameters that do not depend on the geometry, and launches a block for each query
// tile. `keys`: tokens of a head.
template <class Traits, class Geometry, class Mechanism>
void run_kernel(KernelParams<Geometry, Mechanism>& params, FmhaProblem const& p, int32_t q_tiles,
                int64_t keys, ExecutionContext const& context) {
  params.q = p.q;
  params.k = p.k;
  params.v = p.v;
  params.out = p.out.data;
  params.lse = p.lse;
  params.head_dim = p.head_dim;
  params.heads_q = p.heads_q;
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.scheduler =
      make_scheduler(p.heads_q, p.batch, q_tiles,
                     heads_side_by_side(p, static_cast<double>(std::max<int64_t>(keys, 1))));
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts), p.heads_q};

  auto* const kernel = &attention_kernel<Traits, Geometry, Mechanism>;
  constexpr int kSmemBytes = sizeof(SharedStorage<Traits, Geometry>);
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

}  // namespace sparse_fmha::sm80
