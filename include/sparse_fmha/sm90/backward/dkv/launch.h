// The registry row of a dK/dV kernel.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/row.h"

namespace sparse_fmha::sm90 {

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Traits = DkvTraits<Config>;
  KernelRow row = dkv_row<Config, Traits>(Pass::kBackwardDkv, name);
  row.launch = &KeyGeometry<Config, Traits>::launch;
  return row;
}

}  // namespace sparse_fmha::sm90
