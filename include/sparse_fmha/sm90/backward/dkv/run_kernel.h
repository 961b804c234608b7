// The common part of every launch of a dK/dV kernel.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/sm90/backward/dkv/kernel.h"
#include "sparse_fmha/sm90/common/persistent.h"

namespace sparse_fmha::sm90 {

// Key heads per group: as many as have queries and dO that fit in the L2 cache together.
inline int32_t heads_in_cache(FmhaProblem const& p, int64_t queries) {
  constexpr double kCacheBytes = 24e6;
  double const bytes = 4.0 * queries * p.head_dim * (p.heads_q / p.heads_kv);
  return static_cast<int32_t>(std::clamp(kCacheBytes / bytes, 1.0, 16.0));
}

// Fills in the parameters that do not depend on the geometry, and launches.
template <class Traits, class Geometry, class Mechanism>
void run_dkv_kernel(DkvParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                    ExecutionContext const& context) {
  params.heads_per_kv = p.heads_q / p.heads_kv;
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * M_LOG2E);
  auto* kernel = &attention_kernel_dkv<Traits, Geometry, Mechanism>;
  constexpr int kSmemBytes = sizeof(DkvStorage<Traits, Geometry>);
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  int const blocks = prepare_persistent(params.scheduler, context);
  kernel<<<blocks, Traits::kThreads, kSmemBytes, static_cast<cudaStream_t>(context.stream)>>>(
      params);
  check_cuda(cudaGetLastError(), "launching the dK/dV kernel");
}

}  // namespace sparse_fmha::sm90
