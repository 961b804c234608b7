// What the matrix products of all passes share. Registers of fragments are as in
// device/mma_tile.h; accumulators as in device/accumulator.h.
#pragma once

#include "sparse_fmha/device/cute.h"
#include "sparse_fmha/device/mma_tile.h"

namespace sparse_fmha::device {

// Adds rows x 16 columns to accumulators i and i + 1 of 8 columns each.
template <class Element, class Sum>
__device__ __forceinline__ void multiply_16(Sum& sum, int i, uint32_t const (&a)[4],
                                            uint32_t const (&b)[4]) {
  using Mma = WarpMma<Element>;
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    int const c = 4 * (i + half);
    Mma::fma(sum(c), sum(c + 1), sum(c + 2), sum(c + 3), a[0], a[1], a[2], a[3], b[2 * half],
             b[2 * half + 1], sum(c), sum(c + 1), sum(c + 2), sum(c + 3));
  }
}

// Two sums rounded to 16 bits, as a register of a fragment.
template <class Element>
__device__ __forceinline__ uint32_t rounded(float low, float high) {
  cutlass::Array<float, 2> pair;
  pair[0] = low;
  pair[1] = high;
  auto const result = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
  return reinterpret_cast<uint32_t const&>(result);
}

// Weights of a row tile rounded to 16 bits: the accumulator of the scores is the first factor of
// the second product, register by register.
template <class Traits>
struct Weights {
  uint32_t step[Traits::kTileK / 16][4];

  template <class RowScores>
  __device__ __forceinline__ void take(RowScores const& scores) {
    CUTE_UNROLL
    for (int s = 0; s < Traits::kTileK / 16; ++s) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        int const i = 4 * (2 * s + r / 2) + 2 * (r % 2);
        step[s][r] = rounded<typename Traits::Element>(scores(i), scores(i + 1));
      }
    }
  }
};

// Four matrices of 8 x 8 from shared memory.
__device__ __forceinline__ void load_four(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}
// The same, each of them transposed.
__device__ __forceinline__ void load_four_transposed(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

}  // namespace sparse_fmha::device
