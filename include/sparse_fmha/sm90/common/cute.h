// The CuTe and CUTLASS headers for Hopper, included in one place.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {}

namespace sparse_fmha::sm90 {
using namespace device;  // code that is not specific to Hopper
}
