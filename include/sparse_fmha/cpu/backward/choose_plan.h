// Plans of backward passes on the host.
#pragma once

#include <vector>

#include "sparse_fmha/cpu/backward/plan.h"

namespace sparse_fmha::cpu {

// Tiles of both walks, by a cost model. They do not depend on the number of threads, so neither do
// the sums of gradients.
BackwardPlan plan_backward(FmhaProblem const& problem);

// Where each group's visits begin among those of all (batch entry, query head, group), of problems
// whose tiles are skipped, and at the end their number.
std::vector<int64_t> visit_offsets(FmhaProblem const& problem);

// The memory that `lists` of a plan points to.
struct TransposedMemory {
  std::vector<int64_t> offsets;
  std::vector<TransposedLists::Entry> entries;
};

// Transposes block lists to blocks of keys, in time proportional to the number of listed blocks.
TransposedLists transpose(BlockSparse::Params const& params, int32_t batch, int32_t heads,
                          TransposedMemory& memory);

}  // namespace sparse_fmha::cpu
