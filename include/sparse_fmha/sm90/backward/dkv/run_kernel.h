// The common part of every launch of a dK/dV kernel.
#pragma once

#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/query_sums.h"
#include "sparse_fmha/sm90/backward/dkv/kernel.h"
#include "sparse_fmha/sm90/common/persistent.h"

namespace sparse_fmha::sm90 {

// Key heads per group: as many as have queries and dO that fit in the L2 cache together.
inline int32_t heads_in_cache(FmhaProblem const& p, int64_t queries) {
  return heads_in_cache(2.0 * queries * (p.head_dim + p.value_dim) * (p.heads_q / p.heads_kv));
}

// Runs `launch` with sums of dQ for kernels that add it up, and rounds the sums.
template <class Traits, class Params, class Launch>
void with_query_sums(Params& params, FmhaProblem const& p, device::SumTiles const& tiles,
                     ExecutionContext const& context, Launch const& launch) {
  if constexpr (Traits::kAddsDq) {
    float* const sums = device::new_query_sums(p, tiles, context);
    params.dq = {reinterpret_cast<float4*>(sums), p.heads_q, tiles.count(), p.head_dim, 0};
    launch();
    device::round_query_sums(p, tiles, sums, device::SumOrder::kThreads, context);
  } else {
    launch();
  }
}

// Fills in the parameters that do not depend on the geometry, and launches. `bias` is filled in.
template <class Traits, class Geometry, class Mechanism>
void run_dkv_kernel(DkvParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                    ExecutionContext const& context) {
  params.heads_per_kv = p.heads_q / p.heads_kv;
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * M_LOG2E);
  params.soft_cap = soft_cap(p);
  bool const scaled = params.bias.from.keys.data != nullptr || p.softcap != 0;
  params.exponent_scale = scaled ? 1.f : params.scale_log2;
  launch_persistent<Traits::kThreads, sizeof(StorageOf<Traits, Geometry>)>(
      &attention_kernel_dkv<Traits, Geometry, Mechanism>, params, context,
      "launching the dK/dV kernel");
}

}  // namespace sparse_fmha::sm90
