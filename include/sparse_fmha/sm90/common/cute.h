// CuTe and CUTLASS for Hopper, included in this one place.
//
// A kernel whose tile has keys for which CuTe lacks a matrix instruction is compiled with
// CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED (cmake/Gpu.cmake): to read them all takes longer than to
// compile a kernel. Without it a selector falls back to width 16 in silence, which
// forward/traits.h refuses.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {}

namespace sparse_fmha::sm90 {
using namespace device;  // what any GPU can run
}
