// The CuTe and CUTLASS headers for code of all GPUs, included in one place.
//
// A source file whose kernels need a width of Hopper's matrix instructions that CuTe defines on
// request alone asks for it first: tools/kernel_list.py.
#pragma once

#include <cudaTypedefs.h>  // first, because CUTLASS includes it inside a namespace

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
