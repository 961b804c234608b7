// What ssa_choices_isa.cpp has for each instruction set.
#pragma once

#include <cstddef>

#include "sparse_fmha/core/ssa_choices.h"

namespace sparse_fmha::cpu {

inline constexpr int32_t kSsaRows = 64;  // tokens times heads of a thread at a time, if it can be

// Tokens next to each other of a key head.
struct SsaTokens {
  int32_t entry;
  int32_t head_kv;
  int32_t first;
  int32_t count;
};

struct SsaIsa {
  // Scratch memory per thread in bytes, aligned to 64.
  size_t (*scratch)(SsaChoices const&);
  // The weights of all blocks that are complete at the last token, [token][columns].
  void (*weights)(SsaChoices const&, SsaTokens const&, double* to, void* scratch);
};

namespace baseline {
SsaIsa ssa(DataType dtype);
}  // namespace baseline
namespace avx2 {
SsaIsa ssa(DataType dtype);
}  // namespace avx2
namespace avx512 {
SsaIsa ssa(DataType dtype);
}  // namespace avx512

}  // namespace sparse_fmha::cpu
