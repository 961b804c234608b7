#include "kept_tiles.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "placement.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/device/kept_tiles.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

namespace {

void require_noted(FmhaProblem const& problem) {
  auto const& sparsity = problem.sparsity;
  if (!std::holds_alternative<Dense::Params>(sparsity) &&
      !std::holds_alternative<Causal::Params>(sparsity)) {
    throw not_implemented(std::string("sparse_fmha: gradients of ") +
                          Mechanisms::kNames[sparsity.index()] +
                          " with skip_threshold run on the CPU only; move the tensors to the CPU");
  }
  // Forward kernels of larger head dims do not note what they keep.
  constexpr int32_t kLargest = 128;
  if (problem.head_dim > kLargest) {
    throw not_implemented(
        "sparse_fmha: gradients with skip_threshold have GPU kernels for head dims up to 128, "
        "got " +
        std::to_string(problem.head_dim) + "; move the tensors to the CPU");
  }
}

std::vector<int64_t> sizes_of_kept(FmhaProblem const& problem) {
  return {problem.batch, problem.heads_q, kept_groups(problem), kept_words(problem)};
}

uint32_t* checked_kept(FmhaProblem const& problem, Tensor const& q, Tensor& kept) {
  require(kept.scalar_type() == ScalarType::Int, "kept must have dtype int32, got ",
          torch::headeronly::toString(kept.scalar_type()));
  std::vector<int64_t> const sizes = sizes_of_kept(problem);
  require(sizes_of(kept) == sizes, "kept must have shape [", sizes[0], ", ", sizes[1], ", ",
          sizes[2], ", ", sizes[3], "], as fmha_fwd returns it, got ", shape_of(kept));
  require(on_one_device(kept, q), "kept must be on q's device, ", device_of(q), ", got ",
          device_of(kept));
  kept = torch::stable::contiguous(kept);
  return static_cast<uint32_t*>(kept.data_ptr());
}

}  // namespace

Tensor new_kept_tiles(FmhaProblem& problem, Tensor const& q) {
  if (on_cpu(q)) {
    return new_tensor(q, {problem.batch, problem.heads_q, 0, 0}, ScalarType::Int);
  }
  Tensor kept = new_tensor(q, sizes_of_kept(problem), ScalarType::Int);
  torch::stable::fill_(kept, 0.0);
  problem.kept_tiles = static_cast<uint32_t*>(kept.data_ptr());
  return kept;
}

void show_kept_tiles(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& kept,
                     Launch& launch) {
  require_noted(problem);
  require(kept.has_value(),
          "kept must be given with skip_threshold on a GPU, as fmha_fwd returns it with save_kept");
  problem.kept_tiles = checked_kept(problem, q, *kept);
  KernelInfo const& forward = kernel_for(problem, q, Pass::kForward).info;
  require(forward.tile_k % device::kKeptBlock == 0 && forward.tile_k >= kKeptTile,
          "the key tiles of ", forward.name, " must be a multiple of ", device::kKeptBlock,
          " and at least ", kKeptTile, ", got ", forward.tile_k);
  device::show_kept_blocks(problem, forward.tile_k, launch.context());
}

}  // namespace sparse_fmha
