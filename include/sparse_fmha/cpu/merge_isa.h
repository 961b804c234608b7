// The function that is compiled once per instruction set, for merge.cpp.
#pragma once

#include "sparse_fmha/core/merge.h"

namespace sparse_fmha::cpu {

// Merges the rows [first, last).
using MergeRows = void (*)(MergeProblem const&, int64_t first, int64_t last);

namespace baseline {
MergeRows merge_rows(DataType dtype);
}
namespace avx2 {
MergeRows merge_rows(DataType dtype);
}
namespace avx512 {
MergeRows merge_rows(DataType dtype);
}

}  // namespace sparse_fmha::cpu
