// The registry row of a dQ kernel.
#pragma once

#include "sparse_fmha/sm80/backward/dq/kernel.h"
#include "sparse_fmha/sm80/forward/kernel_row.h"
#include "sparse_fmha/sm80/geometry/geometry_of.h"

namespace sparse_fmha::sm80 {

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Traits = DqTraits<Config>;
  using Mechanism = typename Config::Mechanism;
  return row_of<Traits, typename GeometryOf<Mechanism>::template Type<Traits, Mechanism>>(name);
}

}  // namespace sparse_fmha::sm80
