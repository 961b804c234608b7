// The common part of every launch of a Hopper kernel.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/sm90/common/persistent.h"
#include "sparse_fmha/sm90/forward/kernel.h"

namespace sparse_fmha::sm90 {

// Fills in the parameters that do not depend on the geometry, and launches.
template <class Traits, class Geometry, class Mechanism>
void run_kernel(KernelParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                ExecutionContext const& context) {
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts), p.heads_q};

  auto* kernel = &attention_kernel<Traits, Geometry, Mechanism>;
  constexpr int kSmemBytes = sizeof(SharedStorage<Traits, Geometry>);
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  int const blocks = prepare_persistent(params.scheduler, context);
  kernel<<<blocks, kBlockThreads<Traits, Geometry>, kSmemBytes,
           static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), "launching the attention kernel");
}

}  // namespace sparse_fmha::sm90
