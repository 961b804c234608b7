#include "skipped_tiles.h"

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "placement.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/device/kept_tiles.h"
#include "sparse_fmha/planning/skip_bits.h"
#include "sparse_fmha/planning/skip_tile.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

namespace {

std::vector<int64_t> sizes_of_skipped(FmhaProblem const& problem) {
  KernelTile const tile = skip_tile(Neighborhood::kName, problem);
  SkipSizes const sizes = skip_sizes(problem, tile.tile_k, tile.head_dim);
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

namespace {

// The problem's forward kernel. The problem points into what it saved.
KernelInfo const& read_skipped_tiles(FmhaProblem& problem, Tensor const& q,
                                     std::optional<Tensor>& skipped) {
  require(skipped.has_value(),
          "skipped must be given with skip_threshold on a GPU, as fmha_fwd returns it with "
          "save_skipped");
  problem.skip_bits = checked_skipped(problem, q, *skipped);
  return kernel_for(problem, q, Pass::kForward).info;
}

}  // namespace

void show_kept_tiles(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& skipped,
                     Launch& launch) {
  KernelInfo const& forward = read_skipped_tiles(problem, q, skipped);
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

device::KeptWindows kept_windows(FmhaProblem& problem, Tensor const& q,
                                 std::optional<Tensor>& skipped, Launch& launch) {
  KernelInfo const& forward = read_skipped_tiles(problem, q, skipped);
  KernelTile const saved = skip_tile(Neighborhood::kName, problem);
  require(forward.tile_k == saved.tile_k && forward.key.head_dim == saved.head_dim,
          "the bits of skipped tiles are those of a kernel for tiles of ", saved.tile_k,
          " keys, got ", forward.name);
  return device::copy_kept_windows(problem, forward, launch.context());
}

}  // namespace sparse_fmha
