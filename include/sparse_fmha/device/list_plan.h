// Plans computed from lists on the device, before the kernel runs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "sparse_fmha/planning/list_stages.h"

namespace sparse_fmha::device {

// Sizes of the lists of a problem.
struct ListSizes {
  int32_t lists;    // (batch entries or 1) * (query heads or 1)
  int32_t heads;    // query heads, or 1
  int32_t blocks;   // query blocks per list
  int32_t q_tiles;  // query tiles of 128 rows
};

// Params: those of BlockSparse or Stripe.
template <class Params>
ListSizes list_sizes(Params const& p, int32_t batch, int32_t heads) {
  int32_t const own_heads = p.head_stride == 0 ? 1 : heads;
  return {(p.batch_stride == 0 ? 1 : batch) * own_heads, own_heads, ceil_div(p.len_q, p.block_q),
          ceil_div(p.len_q, 128)};
}

// Size of a plan in device memory.
size_t list_plan_bytes(BlockSparse::Params const& params, ListSizes const& sizes);

// Launches the kernels that fill the plan, which is in `memory`. They order the query tiles by the
// number of key tiles they visit, and merge the full lists of two query blocks of 64 rows into: key
// blocks in both, in the first alone, in the second alone; each in ascending order.
ListPlan plan_lists(BlockSparse::Params const& params, ListSizes const& sizes, void* memory,
                    cudaStream_t stream);

}  // namespace sparse_fmha::device
