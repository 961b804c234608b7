#include "kept_tiles.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/device/kept_tiles.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

namespace {

// Forward kernels of larger head dims do not note what they keep.
void require_noted(FmhaProblem const& problem) {
  constexpr int32_t kLargest = 128;
  if (problem.head_dim > kLargest) {
    throw not_implemented(
        "sparse_fmha: gradients with skip_threshold have GPU kernels for head dims up to 128, "
        "got " +
        std::to_string(problem.head_dim) + "; move the tensors to the CPU");
  }
}

}  // namespace

void show_kept_tiles(FmhaProblem& problem, Tensor const& q, Launch& launch) {
  auto const& sparsity = problem.sparsity;
  if (!std::holds_alternative<Dense::Params>(sparsity) &&
      !std::holds_alternative<Causal::Params>(sparsity)) {
    throw not_implemented(std::string("sparse_fmha: gradients of ") +
                          Mechanisms::kNames[sparsity.index()] +
                          " with skip_threshold run on the CPU only; move the tensors to the CPU");
  }
  require_noted(problem);
  KernelRow const& kernel = kernel_for(problem, q, Pass::kForward);
  int32_t const tile_k = kernel.info.tile_k;
  require(tile_k % device::kKeptBlock == 0, "the key tiles of ", kernel.info.name,
          " must be a multiple of ", device::kKeptBlock, ", got ", tile_k);
  FmhaProblem again = problem;
  auto* const memory = launch.context().memory;
  int64_t const heads = int64_t{problem.batch} * problem.heads_q;
  int64_t const rows = heads * volume(problem.grid_q);
  Tensor out = new_tensor(q, sizes_of(q), q.scalar_type());
  again.out = view(out);
  again.lse = static_cast<float*>(memory->allocate(static_cast<size_t>(rows) * sizeof(float)));
  Tensor counts = new_tensor(q, {heads, 2}, ScalarType::Long);
  torch::stable::fill_(counts, 0.0);
  again.skip_counts = static_cast<int64_t*>(counts.data_ptr());
  int64_t const groups = ceil_div(problem.grid_q[kGridAxes - 1], 64);
  int64_t const tiles = ceil_div(problem.grid_kv[kGridAxes - 1], tile_k);
  Tensor kept = new_tensor(q, {heads, groups, tiles}, ScalarType::Byte);
  torch::stable::fill_(kept, 0.0);
  again.kept_tiles = static_cast<uint8_t*>(kept.data_ptr());
  kernel.launch(again, launch.context());
  problem.sparsity = device::list_kept_tiles(again, tile_k, launch.context());
  problem.skip_threshold = nullptr;
}

}  // namespace sparse_fmha
