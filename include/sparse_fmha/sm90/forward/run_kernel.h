// What every launch of a Hopper kernel shares.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/sm90/forward/kernel.h"

namespace sparse_fmha::sm90 {

// Heads go in equal groups of at most `largest`.
inline Scheduler make_scheduler(int32_t heads, int32_t batch, int32_t q_tiles, int32_t largest) {
  int64_t const num_tiles = static_cast<int64_t>(q_tiles) * heads * batch;
  if (num_tiles > INT32_MAX / 2) {
    throw std::runtime_error("sparse_fmha: batch * heads * query tiles is " +
                             std::to_string(num_tiles) + ", above 2^30");
  }
  int32_t const instances = heads * batch;
  int32_t const groups = ceil_div(instances, largest);
  return {nullptr,   static_cast<int32_t>(num_tiles), q_tiles, heads,
          instances, ceil_div(instances, groups)};
}

// Fills in what does not depend on the geometry, and launches.
template <class Traits, class Geometry, class Mechanism>
void run_kernel(KernelParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                ExecutionContext const& context) {
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts), p.heads_q};

  auto const stream = static_cast<cudaStream_t>(context.stream);
  Scheduler& scheduler = params.scheduler;
  int const blocks = std::min(scheduler.num_tiles, multiprocessor_count());
  if (scheduler.num_tiles > blocks) {
    scheduler.next = static_cast<int32_t*>(context.memory->allocate(sizeof(int32_t)));
    check_cuda(cudaMemsetAsync(scheduler.next, 0, sizeof(int32_t), stream),
               "clearing the tile counter");
  }
  auto* kernel = &attention_kernel<Traits, Geometry, Mechanism>;
  constexpr int kSmemBytes = sizeof(SharedStorage<Traits, Geometry>);
  static OncePerDevice raise_limit;
  raise_limit([&] {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "raising the shared-memory limit");
  });
  kernel<<<blocks, kBlockThreads<Traits, Geometry>, kSmemBytes, stream>>>(params);
  check_cuda(cudaGetLastError(), "launching the attention kernel");
}

}  // namespace sparse_fmha::sm90
