// The common part of every launch of a dK/dV kernel.
#pragma once

#include <cmath>

#include "sparse_fmha/device/query_sums.h"
#include "sparse_fmha/sm80/backward/dkv/block.h"
#include "sparse_fmha/sm80/forward/run_kernel.h"

namespace sparse_fmha::sm80 {

// Keys and values, and their gradients: of the tokens, or of the extra tokens.
struct KeyTensors {
  TensorView k;
  TensorView v;
  TensorView dk;
  TensorView dv;
};

// Runs `launch` with sums of dQ for kernels that add it up, and rounds the sums.
template <class Traits, class Params, class Launch>
void with_query_sums(Params& params, FmhaProblem const& p, device::SumTiles const& tiles,
                     ExecutionContext const& context, Launch const& launch) {
  if constexpr (Traits::kAddsDq) {
    float* const sums = device::new_query_sums(p, tiles, context);
    params.dq = {sums, tiles.count()};
    launch();
    device::round_query_sums(p, tiles, sums, device::SumOrder::kNumbers, context);
  } else {
    launch();
  }
}

// Fills in the parameters that do not depend on the geometry, and launches a block for each key
// tile. `queries`: tokens of a head.
template <class Traits, class Geometry, class Mechanism>
void run_dkv_kernel(DkvParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                    KeyTensors const& keys, int32_t key_tiles, int64_t queries,
                    ExecutionContext const& context) {
  params.q = p.q;
  params.k = keys.k;
  params.v = keys.v;
  params.dout = p.gradients->out;
  params.terms = reinterpret_cast<float4 const*>(p.gradients->row_terms);
  params.dk = keys.dk.data;
  params.dv = keys.dv.data;
  params.head_dim = p.head_dim;
  params.heads_q = p.heads_q;
  params.heads_kv = p.heads_kv;
  params.heads_per_kv = p.heads_q / p.heads_kv;
  params.scale = static_cast<float>(p.scale);
  // Zero would turn the infinity of a masked score into NaN.
  double const scale_log2 = std::max(std::abs(p.scale) * M_LOG2E, 1e-30);
  params.scale_log2 = static_cast<float>(std::copysign(scale_log2, p.scale));
  // A key head's blocks read the queries and dO of the group, and may add to its sums of dQ.
  double const bytes = (Traits::kAddsDq ? 8.0 : 4.0) *
                       static_cast<double>(std::max<int64_t>(queries, 1)) * p.head_dim *
                       params.heads_per_kv;
  params.scheduler = make_scheduler(p.heads_kv, p.batch, key_tiles, heads_in_l2(bytes));
  launch_tiles<Traits, sizeof(BackwardStorage<Traits, Geometry>)>(
      &attention_kernel_dkv<Traits, Geometry, Mechanism>, params, context);
}

}  // namespace sparse_fmha::sm80
