// The registry row of a dQ kernel.
#pragma once

#include "sparse_fmha/sm80/backward/dq/kernel.h"
#include "sparse_fmha/sm80/forward/kernel_row.h"
#include "sparse_fmha/sm80/geometry/geometry_of.h"

namespace sparse_fmha::sm80 {

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  return row_of<DqTraits<Config>, GeometryOf>(name);
}

}  // namespace sparse_fmha::sm80
