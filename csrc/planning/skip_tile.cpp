#include "sparse_fmha/planning/skip_tile.h"

#include <cstring>

#include "sparse_fmha/core/arch.h"

namespace sparse_fmha {
namespace {

// The CPU skips the same tiles as the kernels of this architecture.
constexpr Arch kLike = Arch::kSm90;

}  // namespace

KernelTile skip_tile(char const* mechanism, FmhaProblem const& problem) {
  struct {
    Arch arch;
    char const* mechanism;
    KernelTile tile;
  } constexpr kRows[] = {
#define SPARSE_FMHA_SKIP_TILE(arch, mechanism, head_dim, value_dim, tile_k) \
  {Arch::arch, mechanism::kName, {head_dim, value_dim, tile_k}},
#include "skip_tiles.inc"  // from csrc/kernels/*.def
#undef SPARSE_FMHA_SKIP_TILE
  };
  for (auto const& row : kRows) {  // in ascending order of head dims
    if (row.arch == kLike && row.tile.head_dim >= problem.head_dim &&
        row.tile.value_dim >= problem.value_dim && std::strcmp(row.mechanism, mechanism) == 0) {
      return row.tile;
    }
  }
  return {128, 128, 128};
}

}  // namespace sparse_fmha
