// The registry row of a kernel of all gradients: that of dK and dV, with dQ added up in memory and
// rounded afterwards. Five products for each pair of tiles, where two kernels need seven.
#pragma once

#include "sparse_fmha/device/query_sums.h"
#include "sparse_fmha/sm90/backward/dkv/row.h"

namespace sparse_fmha::sm90 {

template <class Geometry>
void launch_fused(FmhaProblem const& given, ExecutionContext const& context) {
  Gradients gradients = *given.gradients;
  FmhaProblem problem = given;
  problem.gradients = &gradients;
  gradients.q_sums = device::new_query_sums(problem, context);
  Geometry::launch(problem, context);
  device::round_query_sums(problem, context);
}

// Measured: at head dim 64 a warpgroup for dQ alone is faster; at 128 it leaves too few registers.
template <class Config>
inline constexpr QueryGradient kDq =
    Config::kHeadDim == 128 ? QueryGradient::kByConsumers : QueryGradient::kByWarpgroup;

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Traits = DkvTraits<Config, kDq<Config>>;
  KernelRow row = dkv_row<Config, Traits>(Pass::kBackwardFused, name);
  row.launch = &launch_fused<KeyGeometry<Config, Traits>>;
  return row;
}

}  // namespace sparse_fmha::sm90
