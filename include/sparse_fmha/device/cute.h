// What every GPU's code takes of CuTe and CUTLASS, included in this one place.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
