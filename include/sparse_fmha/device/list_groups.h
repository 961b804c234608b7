// Merged lists of groups of query blocks, computed on the device before the kernel runs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "sparse_fmha/mechanisms/block_sparse.h"
#include "sparse_fmha/planning/list_groups.h"

namespace sparse_fmha::device {

struct GroupSizes {
  int32_t lists;         // (batch entries or 1) * (query heads or 1)
  int32_t blocks;        // query blocks of a list
  int32_t groups;        // of a list
  int32_t key_blocks;    // of 64 keys
  int32_t width;         // of a merged list
  int64_t batch_stride;  // in groups; 0 if the lists are shared
  int64_t head_stride;
};

struct GroupPlan {
  int32_t const* order;   // [lists, groups]: heaviest first
  int32_t const* counts;  // [lists, groups]: entries
  GroupEntry const*
      entries;  // [lists, groups, width]; a key block that ends behind the last key is first
};

// Whether lists can be merged: query blocks of 64 rows, key blocks of 64 or 128 keys, which are
// seen entirely.
bool can_group(BlockSparse::Params const& params);

GroupSizes group_sizes(BlockSparse::Params const& params, int32_t batch, int32_t heads);
// Size of a plan in device memory.
size_t group_plan_bytes(GroupSizes const& sizes);
// Launches the kernels that fill the plan, which is in `memory`.
GroupPlan plan_groups(BlockSparse::Params const& params, GroupSizes const& sizes, void* memory,
                      cudaStream_t stream);

}  // namespace sparse_fmha::device
