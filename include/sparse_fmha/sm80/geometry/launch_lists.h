// The launch of geometries whose lists are for blocks of query rows.
#pragma once

#include <variant>

#include "sparse_fmha/sm80/forward/run_kernel.h"

namespace sparse_fmha::sm80 {

template <template <class, class> class Geometry, class Traits, class Mechanism>
void launch_lists(FmhaProblem const& p, ExecutionContext const& context) {
  auto const& sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  if (sparsity.block_q % Traits::kTileQ == 0) {
    KernelParams<Geometry<Traits, Mechanism>, Mechanism> params;
    params.geometry = Geometry<Traits, Mechanism>::params_of(sparsity);
    params.sparsity = sparsity;
    run_kernel<Traits>(params, p, ceil_div(sparsity.len_q, Traits::kTileQ), sparsity.len_kv,
                       context);
  } else {  // 64 rows have lists of their own
    launch_lists<Geometry, typename Traits::template WithTileQ<64>, Mechanism>(p, context);
  }
}

}  // namespace sparse_fmha::sm80
