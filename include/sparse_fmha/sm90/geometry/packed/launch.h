// Launches over packed sequences.
#pragma once

#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/packed/packed.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
void Packed<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  device::PackedKeys keys;
  KernelParams<Packed, Mechanism> params;
  auto& g = params.geometry;
  g.plan = device::plan_packed(p, Traits::kTileQ, context, keys);
  auto map = [&](TensorView const& view, int heads, uint32_t rows) {
    return ragged_map(view, p.dtype, heads, p.head_dim, rows);
  };
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    g.q[i] = map(Traits::queries(p, i), p.heads_q, 64);
  }
  g.k = map(keys.k, p.heads_kv, Traits::kTileK);
  g.v = map(keys.v, p.heads_kv, Traits::kTileK);
  g.out = map(Traits::output(p), p.heads_q, 64);
  g.rows = Traits::row_values(p);
  g.heads_q = p.heads_q;
  g.page_size = p.packed->table.page_size;
  g.causal = std::holds_alternative<Causal::Params>(p.sparsity);
  // As in geometry/sequence: tiles differ in weight.
  constexpr int32_t kHeadsOfGroup = 16;
  static_cast<device::Scheduler&>(params.scheduler) =
      make_scheduler(p.heads_q, 1, g.plan.most, kHeadsOfGroup);
  params.scheduler.count = g.plan.count;
  run_kernel<Traits>(params, p, context, {.own = 3});
}

}  // namespace sparse_fmha::sm90
