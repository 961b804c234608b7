// Launches of the kernel for groups of query blocks.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/schedule.h"
#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/common/persistent.h"
#include "sparse_fmha/sm90/list_groups/kernel.h"

namespace sparse_fmha::sm90 {

template <class Traits>
void launch_list_groups(FmhaProblem const& p, ExecutionContext const& context) {
  static_assert(sizeof(GroupStorage<Traits>) <= Traits::kSmemLimit, "the ring fits a block");
  auto const& sparsity = std::get<BlockSparse::Params>(p.sparsity);
  auto map = [&](TensorView const& view, int64_t length, int heads) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, p.head_dim,
                               ListGroup::kBlock);
  };
  GroupParams<Traits> params;
  params.q = map(p.q, sparsity.len_q, p.heads_q);
  params.k = map(p.k, sparsity.len_kv, p.heads_kv);
  params.v = map(p.v, sparsity.len_kv, p.heads_kv);
  params.out = map(p.out, sparsity.len_q, p.heads_q);
  params.lse = p.lse;
  params.len_q = sparsity.len_q;
  params.len_kv = sparsity.len_kv;
  params.heads_q = p.heads_q;
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.sizes = device::group_sizes(sparsity, p.batch, p.heads_q);
  params.plan = device::plan_groups(sparsity, params.sizes,
                                    context.memory->allocate(group_plan_bytes(params.sizes)),
                                    static_cast<cudaStream_t>(context.stream));
  int32_t const heads = heads_in_cache(4.0 * sparsity.len_kv * p.head_dim * p.heads_kv / p.heads_q);
  params.scheduler = make_scheduler(p.heads_q, p.batch, params.sizes.groups, heads);
  launch_persistent<Traits::kThreads, sizeof(GroupStorage<Traits>)>(
      &list_groups_kernel<Traits>, params, context, "launching the kernel for groups of blocks");
}

}  // namespace sparse_fmha::sm90
