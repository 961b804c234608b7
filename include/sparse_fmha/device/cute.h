// What every GPU's code takes of CuTe and CUTLASS, included in this one place.
#pragma once

#include <cudaTypedefs.h>  // first: CUTLASS includes it, too, but in a namespace

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
