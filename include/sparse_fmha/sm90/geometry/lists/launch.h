// Launches of mechanisms with lists of key blocks.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/device/list_plan.h"
#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/lists/lists.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
void Lists<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  KernelParams<Lists, Mechanism> params;
  auto const& sparsity = params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  BoxSizes const boxes = box_sizes(sparsity.block_kv, Traits::kTileK);
  int const box = 1 << boxes.log2_box;
  auto map = [&](TensorView const& view, int64_t length, int heads, int dim, int rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, dim, rows);
  };
  ListSizes const sizes = list_sizes(sparsity, p.batch, p.heads_q);
  params.geometry = {
      {},
      map(p.k, sparsity.len_kv, p.heads_kv, p.head_dim, box),
      map(p.v, sparsity.len_kv, p.heads_kv, p.value_dim, box),
      map(Traits::output(p), sparsity.len_q, p.heads_q, Traits::output_dim(p), 64),
      Traits::row_values(p),
      p.heads_q,
      sizes.q_tiles,
      boxes,
      plan_lists(sparsity, sizes, context.memory->allocate(list_plan_bytes(sparsity, sizes)),
                 static_cast<cudaStream_t>(context.stream))};
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    params.geometry.q[i] =
        map(Traits::queries(p, i), sparsity.len_q, p.heads_q, Traits::query_dim(p, i), 64);
  }
  // Group as many heads as have keys and values that fit in the L2 cache together.
  int32_t const group =
      heads_in_cache(2.0 * sparsity.len_kv * (p.head_dim + p.value_dim) * p.heads_kv / p.heads_q);
  params.scheduler = make_scheduler(p.heads_q, p.batch, sizes.q_tiles, group);
  run_kernel<Traits>(params, p, context);
}

}  // namespace sparse_fmha::sm90
