// The registry row of a dQ kernel.
#pragma once

#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/sm90/backward/dq/consumer.h"
#include "sparse_fmha/sm90/backward/dq/traits.h"
#include "sparse_fmha/sm90/forward/kernel_row.h"

namespace sparse_fmha::sm90 {

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  return row_of<Config, DqTraits<Config>>(name);
}

}  // namespace sparse_fmha::sm90
