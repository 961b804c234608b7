// The registry row of a forward kernel.
#pragma once

#include "sparse_fmha/sm90/forward/consumer.h"
#include "sparse_fmha/sm90/forward/kernel_row.h"
#include "sparse_fmha/sm90/forward/traits.h"

namespace sparse_fmha::sm90 {

// Static, because rows of different passes may have the same numbers.
template <class Config, class Served = typename Config::Mechanism>
static KernelRow kernel_row(char const* name) {
  return row_of<Config, KernelTraits<Config>, Served>(name);
}

}  // namespace sparse_fmha::sm90
