// Launches of mechanisms on one axis of tokens.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/sequence/sequence.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
void Sequence<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  int64_t const len_q = volume(p.grid_q);
  int64_t const len_kv = volume(p.grid_kv);
  auto map = [&](TensorView const& view, int64_t length, int heads, int rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, p.head_dim, rows);
  };
  KernelParams<Sequence, Mechanism> params;
  params.geometry = {{},
                     map(p.k, len_kv, p.heads_kv, Traits::kTileK),
                     map(p.v, len_kv, p.heads_kv, Traits::kTileK),
                     map(Traits::output(p), len_q, p.heads_q, 64),
                     Traits::row_values(p),
                     static_cast<int32_t>(len_q),
                     p.heads_q};
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    params.geometry.q[i] = map(Traits::queries(p, i), len_q, p.heads_q, 64);
  }
  params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  // Measured at 4k to 32k: groups of 16 heads where tiles differ in weight (with fewer, thread
  // blocks idle after the last group's heaviest tiles; with more, heads evict each other's keys
  // from the L2 cache), 4 where they do not.
  int32_t const q_tiles = Mechanism::num_query_tiles(params.sparsity, Traits::tile_shape());
  params.scheduler =
      make_scheduler(p.heads_q, p.batch, q_tiles, std::is_same_v<Mechanism, Dense> ? 4 : 16);
  run_kernel<Traits>(params, p, context);
}

}  // namespace sparse_fmha::sm90
