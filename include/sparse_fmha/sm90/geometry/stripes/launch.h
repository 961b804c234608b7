// Launches of mechanisms with lists of single keys and runs.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/stripes/stripes.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
void Stripes<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  KernelParams<Stripes, Mechanism> params;
  auto const& sparsity = params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  BoxSizes const sizes = run_sizes(sparsity, Traits::kTileK);
  int const box = 1 << sizes.log2_box;
  auto map = [&](TensorView const& view, int64_t length, int heads, int dim, int rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, dim, rows);
  };
  auto rows = [&](TensorView const& view, int32_t dim) {
    int64_t const chunks = view.axis_stride[kGridAxes - 1] / 8;  // unit of a row's address
    if (sparsity.len_kv * chunks >= UINT32_MAX) {
      throw std::runtime_error(
          "sparse_fmha: the keys of one head span more than 64 GB, too much for stripes");
    }
    return RowSource{view.data, view.batch_stride, view.head_stride, static_cast<uint32_t>(chunks),
                     dim,       sparsity.len_kv};
  };
  params.geometry = {{},
                     map(p.k, sparsity.len_kv, p.heads_kv, p.head_dim, box),
                     map(p.v, sparsity.len_kv, p.heads_kv, p.value_dim, box),
                     map(Traits::output(p), sparsity.len_q, p.heads_q, Traits::output_dim(p), 64),
                     rows(p.k, p.head_dim),
                     rows(p.v, p.value_dim),
                     Traits::row_values(p),
                     p.heads_q,
                     sizes};
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    params.geometry.q[i] =
        map(Traits::queries(p, i), sparsity.len_q, p.heads_q, Traits::query_dim(p, i), 64);
  }
  // Later query tiles are assumed to be heavier. Group as many heads as have keys and values that
  // fit in the L2 cache together.
  int32_t const group =
      heads_in_cache(2.0 * sparsity.len_kv * (p.head_dim + p.value_dim) * p.heads_kv / p.heads_q);
  params.scheduler = make_scheduler(p.heads_q, p.batch, ceil_div(sparsity.len_q, 128), group);
  run_kernel<Traits>(params, p, context);
}

}  // namespace sparse_fmha::sm90
