// Decode attention's functions that are compiled once per instruction set, for csrc/cpu/decode.cpp.
#pragma once

#include <cstddef>

#include "sparse_fmha/core/decode.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::cpu {

// A group of packed rows of one KV head.
struct DecodeRows {
  int32_t batch;
  int32_t head;
  int32_t row_group;
};

struct DecodeIsa {
  // Scratch memory per thread, and the result of one part of the keys; in bytes, multiples of 64.
  size_t (*scratch_bytes)(FmhaProblem const&);
  size_t (*partial_bytes)(FmhaProblem const&);
  // Attention over the slots [begin, end).
  void (*attend)(FmhaProblem const&, DecodeRows const&, KeyRange slots, void* partial,
                 void* scratch);
  // Merges consecutive partial results in their order and writes out and lse.
  void (*merge)(FmhaProblem const&, DecodeRows const&, int64_t parts, void const* partials);
};

namespace baseline {
DecodeIsa decode(DataType dtype, bool skips);
}
namespace avx2 {
DecodeIsa decode(DataType dtype, bool skips);
}
namespace avx512 {
DecodeIsa decode(DataType dtype, bool skips);
}

}  // namespace sparse_fmha::cpu
