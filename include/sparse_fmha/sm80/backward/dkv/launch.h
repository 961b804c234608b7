// The registry row of a dK/dV kernel.
#pragma once

#include "sparse_fmha/sm80/backward/dkv/kernel.h"
#include "sparse_fmha/sm80/forward/kernel_row.h"
#include "sparse_fmha/sm80/geometry/keys_of.h"

namespace sparse_fmha::sm80 {

template <class Config>
struct DkvTraits : BackwardTraits<Config, Pass::kBackwardDkv> {
  template <class Geometry>
  using Storage = BackwardStorage<DkvTraits, Geometry>;
  template <class Tile>
  static __device__ __forceinline__ void run(Tile const& tile) {
    run_dkv(tile);
  }
};

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  return row_of<DkvTraits<Config>, KeysOf>(name);
}

}  // namespace sparse_fmha::sm80
