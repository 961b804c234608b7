// What hip_search_isa.cpp has for each instruction set.
#pragma once

#include <cstddef>

#include "sparse_fmha/core/hip_search.h"

namespace sparse_fmha::cpu {

struct HipIsa {
  // Scratch memory per thread in bytes, aligned to 64.
  size_t (*scratch)(HipSearch const&);
  // The scores of keys at some positions; -inf for one that does not exist.
  void (*scores)(HipSearch const&, HipItem const&, int32_t const* positions, int32_t count,
                 double* to, void* scratch);
};

namespace baseline {
HipIsa hip(DataType dtype);
}  // namespace baseline
namespace avx2 {
HipIsa hip(DataType dtype);
}  // namespace avx2
namespace avx512 {
HipIsa hip(DataType dtype);
}  // namespace avx512

}  // namespace sparse_fmha::cpu
