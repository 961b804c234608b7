// From a dtype to the type of its elements.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/cpu/element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Calls body with an element of the dtype. A set with 16-bit dot products has code of its own for
// their dtype only (SPARSE_FMHA_BEST_ISA_OF in dispatch.h).
template <class Body>
auto with_element(DataType dtype, Body body) {
#if defined(__AVX512BF16__)
  static_cast<void>(dtype);
#else
  switch (dtype) {
    case DataType::kFloat16:
      return body(Half{});
    case DataType::kFloat32:
      return body(float{});
    case DataType::kFloat64:
      return body(double{});
    case DataType::kBFloat16:
      break;
  }
#endif
  return body(BFloat16{});
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
