#include "skipped_tiles.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "placement.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/device/kept_tiles.h"
#include "sparse_fmha/device/kept_windows.h"
#include "sparse_fmha/planning/skip_bits.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

namespace {

std::vector<int64_t> sizes_of_skipped(FmhaProblem const& problem) {
  SkipSizes const sizes = skip_sizes(problem, kSkipTile, problem.head_dim);
  return {problem.batch, problem.heads_q, sizes.groups, sizes.words};
}

uint32_t* checked_skipped(FmhaProblem const& problem, Tensor const& q, Tensor& skipped) {
  require(skipped.scalar_type() == ScalarType::Int, "skipped must have dtype int32, got ",
          torch::headeronly::toString(skipped.scalar_type()));
  std::vector<int64_t> const sizes = sizes_of_skipped(problem);
  require(sizes_of(skipped) == sizes, "skipped must have shape [", sizes[0], ", ", sizes[1], ", ",
          sizes[2], ", ", sizes[3], "], as fmha_fwd returns it, got ", shape_of(skipped));
  require(on_one_device(skipped, q), "skipped must be on q's device, ", device_of(q), ", got ",
          device_of(skipped));
  skipped = torch::stable::contiguous(skipped);
  return static_cast<uint32_t*>(skipped.data_ptr());
}

}  // namespace

Tensor new_skipped_tiles(FmhaProblem& problem, Tensor const& q) {
  if (on_cpu(q)) {
    return new_tensor(q, {problem.batch, problem.heads_q, 0, 0}, ScalarType::Int);
  }
  Tensor skipped = new_tensor(q, sizes_of_skipped(problem), ScalarType::Int);
  torch::stable::fill_(skipped, 0.0);
  problem.skip_bits = static_cast<uint32_t*>(skipped.data_ptr());
  return skipped;
}

void show_kept_tiles(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& skipped,
                     Launch& launch) {
  require(skipped.has_value(),
          "skipped must be given with skip_threshold on a GPU, as fmha_fwd returns it with "
          "save_skipped");
  problem.skip_bits = checked_skipped(problem, q, *skipped);
  KernelInfo const& forward = kernel_for(problem, q, Pass::kForward).info;
  bool const by_lists = std::holds_alternative<BlockSparse::Params>(problem.sparsity) ||
                        std::holds_alternative<Stripe::Params>(problem.sparsity);
  int32_t const step = by_lists ? kSkipStage : device::kKeptBlock;
  int32_t const least = by_lists ? kSkipStage : kSkipTile;
  require(forward.tile_k % step == 0 && forward.tile_k >= least, "the key tiles of ", forward.name,
          " must be a multiple of ", step, " and at least ", least, ", got ", forward.tile_k);
  if (by_lists) {
    device::show_kept_lists(problem, forward.tile_k, launch.context());
  } else {
    device::show_kept_blocks(problem, forward.tile_k, launch.context());
  }
}

KernelInfo const& skip_tiles_again(FmhaProblem& problem, Tensor const& q, Launch& launch) {
  KernelRow const& forward = kernel_for(problem, q, Pass::kForward);
  ExecutionContext const& context = launch.context();
  problem.skip_bits = device::new_skip_bits(problem, forward.info, context);
  FmhaProblem again = problem;
  Tensor const out = new_tensor(q, sizes_of_out(problem, q), q.scalar_type());
  size_t const rows = static_cast<size_t>(volume(problem.grid_q)) * problem.batch * problem.heads_q;
  size_t const heads = static_cast<size_t>(problem.batch) * problem.heads_q;
  again.out = view(out);
  again.lse = static_cast<float*>(context.memory->allocate(rows * sizeof(float)));
  again.skip_counts = static_cast<int64_t*>(context.memory->allocate(2 * heads * sizeof(int64_t)));
  forward.launch(again, context);
  return forward.info;
}

}  // namespace sparse_fmha
