// The registry row of a kernel of all gradients: that of dK and dV, with dQ added up in memory and
// rounded afterwards. Five products for each pair of tiles, where two kernels need seven.
#pragma once

#include "sparse_fmha/sm80/backward/fused/kernel.h"
#include "sparse_fmha/sm80/forward/kernel_row.h"
#include "sparse_fmha/sm80/geometry/keys_of.h"

namespace sparse_fmha::sm80 {

template <class Config>
struct FusedTraits : BackwardTraits<Config, Pass::kBackwardFused> {
  template <class Geometry>
  using Storage = BackwardStorage<FusedTraits, Geometry>;
  template <class Tile>
  static __device__ __forceinline__ void run(Tile const& tile) {
    run_fused(tile);
  }
};

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  return row_of<FusedTraits<Config>, KeysOf>(name);
}

}  // namespace sparse_fmha::sm80
