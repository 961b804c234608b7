// The merge of attention over parts of the keys on the CPU: dispatch of its rows to all threads.
#include "sparse_fmha/core/merge.h"

#include <algorithm>

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/kernel_rows.h"
#include "sparse_fmha/cpu/merge_isa.h"

namespace sparse_fmha {

void cpu_merge_parts(MergeProblem const& p, ExecutionContext const& context) {
  constexpr int64_t kElements = 1 << 15;  // of an item
  cpu::MergeRows const merge = SPARSE_FMHA_BEST_ISA(merge_rows(p.dtype));
  int64_t const rows = p.rows();
  int64_t const step = std::max<int64_t>(1, kElements / std::max(1, p.head_dim));
  cpu::share(context, (rows + step - 1) / step, 0, [&](int64_t item, void*) {
    merge(p, item * step, std::min(rows, (item + 1) * step));
  });
}

}  // namespace sparse_fmha
