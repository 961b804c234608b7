// Plans of backward passes on the host.
#pragma once

#include <vector>

#include "sparse_fmha/cpu/backward/plan.h"

namespace sparse_fmha::cpu {

// Tiles of both walks, by a cost model. They do not depend on how many threads there are, so
// neither does a sum of gradients.
BackwardPlan plan_backward(FmhaProblem const& problem);

// What `lists` of a plan points to.
struct TransposedMemory {
  std::vector<int64_t> offsets;
  std::vector<TransposedLists::Entry> entries;
};

// Block lists by blocks of keys; takes time in proportion to what is listed.
TransposedLists transpose(BlockSparse::Params const& params, int32_t batch, int32_t heads,
                          TransposedMemory& memory);

}  // namespace sparse_fmha::cpu
