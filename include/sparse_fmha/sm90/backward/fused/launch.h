// The registry row of a kernel of all gradients: that of dK and dV, with dQ added up in memory and
// rounded afterwards. Five products for each pair of tiles, where two kernels need seven.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/row.h"

namespace sparse_fmha::sm90 {

// Measured: at head dim 64 a warpgroup for dQ alone is faster; at 128 it leaves too few registers.
template <class Config>
inline constexpr QueryGradient kDq =
    Config::kHeadDim == 128 ? QueryGradient::kByConsumers : QueryGradient::kByWarpgroup;

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Traits = DkvTraits<Config, kDq<Config>>;
  KernelRow row = dkv_row<Config, Traits>(Pass::kBackwardFused, name);
  row.launch = &KeyGeometry<Config, Traits>::launch;
  return row;
}

}  // namespace sparse_fmha::sm90
