// Launches of dK/dV kernels of mechanisms with lists of keys.
#pragma once

#include "sparse_fmha/device/transposed_lists.h"
#include "sparse_fmha/sm90/geometry/lists/keys.h"
#include "sparse_fmha/sm90/geometry/sequence/launch_keys.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
void ListKeys<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  DkvParams<ListKeys, Mechanism> params;
  params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  params.geometry = {key_copies<Traits>(p),
                     device::transpose_lists(params.sparsity, p, kParts, context)};
  params.bias = bias_params(p);
  params.scheduler = make_scheduler(p.heads_kv, p.batch, params.geometry.lists.key_tiles,
                                    heads_in_cache(p, volume(p.grid_q)));
  with_query_sums<Traits>(params, p, device::sum_tiles(p), context,
                          [&] { run_dkv_kernel<Traits>(params, p, context); });
}

}  // namespace sparse_fmha::sm90
