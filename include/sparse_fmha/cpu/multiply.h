// The matrix product kernel of both products of attention.
#pragma once

#include "sparse_fmha/cpu/operands.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// c = keep * c + a * b, or without kAccumulate c = a * b, in registers. a is [kPanelRows][depth], b
// is [depth][kVectors] with rows kPanel apart. keep[row] is a factor; nullptr means 1. c is added
// last, which keeps the rounding errors of long sums small.
template <bool kAccumulate, int kVectors, class In, class T>
inline void multiply_block(Factor<In> a, In const* b, int depth, T* c, int64_t c_stride,
                           T const* keep) {
  using V = Vector<T>;
  // Unrolled early: else the compiler keeps the sums in memory before and after the steps.
  V sum[kPanelRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V{};
    }
  }
  for (int step = 0; step < depth; ++step) {
    In const* const row = b + static_cast<int64_t>(step) * kPanel<T>;
#pragma GCC unroll 8
    for (int r = 0; r < kPanelRows; ++r) {
      In const x = a.data[r * a.row_stride + step * a.step_stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = add_product(sum[r][v], x, row + v * kWidth<T>);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPanelRows; ++r) {
    V* const to = reinterpret_cast<V*>(c + r * c_stride);
    T const kept = kAccumulate && keep != nullptr ? keep[r] : T(1);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAccumulate) {
        sum[r][v] += kept * to[v];
      }
      to[v] = sum[r][v];
    }
  }
}

// Longer sums are added in parts, because rounding errors grow with the length of a sum.
inline constexpr int kLongestSum = 128;

// The same for any number of rows (a multiple of kPanelRows) and up to kPanelVectors vectors.
// `steps` of a sum; those of a last number that has more are 0.
template <bool kAccumulate, class In, class T>
inline void multiply(Factor<In> a, int rows, In const* b, int vectors, int steps, T* c,
                     int64_t c_stride, T const* keep = nullptr) {
  constexpr int kLongest = kLongestSum / kSteps<In>;
  int const depth = (steps + kSteps<In> - 1) / kSteps<In>;
  with_vectors(vectors, [&](auto count) {
    for (int r = 0; r < rows; r += kPanelRows) {
      Factor<In> block{a.data + r * a.row_stride, a.row_stride, a.step_stride};
      T* const to = c + r * c_stride;
      int const first = depth < kLongest ? depth : kLongest;
      multiply_block<kAccumulate, count.value>(block, b, first, to, c_stride,
                                               keep == nullptr ? nullptr : keep + r);
      for (int step = kLongest; step < depth; step += kLongest) {
        block.data += kLongest * a.step_stride;
        int const next = depth - step < kLongest ? depth - step : kLongest;
        In const* const rows_of_b = b + static_cast<int64_t>(step) * kPanel<T>;
        multiply_block<true, count.value, In, T>(block, rows_of_b, next, to, c_stride, nullptr);
      }
    }
  });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA

#if defined(SPARSE_FMHA_TILE_REGISTERS)
#include "sparse_fmha/cpu/amx/multiply.h"
#endif
