#include "sparse_fmha/core/scores.h"

#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha {

// score_kernels.inc names what tools/score_kernels.py made.
#define SPARSE_FMHA_SCORES(name) ScoreKernels name();
#include "score_kernels.inc"
#undef SPARSE_FMHA_SCORES

std::vector<ScoreKernels> const& score_kernel_table() {
  static std::vector<ScoreKernels> const table = {
#define SPARSE_FMHA_SCORES(name) name(),
#include "score_kernels.inc"
#undef SPARSE_FMHA_SCORES
  };
  return table;
}

ScoreKernels const* look_for_score_kernels(Arch arch, DataType dtype, int32_t head_dim) {
  ScoreKernels const* best = nullptr;
  for (ScoreKernels const& kernels : score_kernel_table()) {
    bool const fits =
        kernels.arch == arch && kernels.dtype == dtype && kernels.head_dim >= head_dim;
    if (fits && (best == nullptr || kernels.head_dim < best->head_dim)) {
      best = &kernels;
    }
  }
  return best;
}

ScoreKernels const& find_score_kernels(Arch arch, DataType dtype, int32_t head_dim) {
  if (ScoreKernels const* const found = look_for_score_kernels(arch, dtype, head_dim)) {
    return *found;
  }
  throw not_implemented(std::string("sparse_fmha: reductions of scores: no kernel for arch=") +
                        to_string(arch) + ", dtype=" + to_string(dtype) + ", head_dim=" +
                        std::to_string(head_dim) + "; score_sums takes these tensors");
}

}  // namespace sparse_fmha
