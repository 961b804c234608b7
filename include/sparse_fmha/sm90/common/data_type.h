// CUTLASS element types as the registry's DataType.
#pragma once

#include <cutlass/numeric_types.h>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::sm90 {

inline DataType data_type(cutlass::half_t) { return DataType::kFloat16; }
inline DataType data_type(cutlass::bfloat16_t) { return DataType::kBFloat16; }

}  // namespace sparse_fmha::sm90
