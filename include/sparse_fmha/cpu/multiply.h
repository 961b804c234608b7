// The matrix product kernel of both products of attention.
#pragma once

#include "sparse_fmha/cpu/vector.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// A matrix whose element (row, step) is data[row * row_stride + step * step_stride].
template <class T>
struct Factor {
  T const* data;
  int64_t row_stride;
  int64_t step_stride;
};

// c = keep * c + a * b, or without kAccumulate c = a * b, in registers. a is [kPanelRows][depth], b
// is [depth][kVectors] with rows kPanel apart. keep[row] is a factor; nullptr means 1. c is added
// last, which keeps the rounding errors of long sums small.
template <bool kAccumulate, int kVectors, class T>
inline void multiply_block(Factor<T> a, T const* b, int depth, T* c, int64_t c_stride,
                           T const* keep) {
  using V = Vector<T>;
  V sum[kPanelRows][kVectors];
  for (int r = 0; r < kPanelRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V{};
    }
  }
  for (int step = 0; step < depth; ++step) {
    V const* const row = reinterpret_cast<V const*>(b + static_cast<int64_t>(step) * kPanel<T>);
    for (int r = 0; r < kPanelRows; ++r) {
      T const x = a.data[r * a.row_stride + step * a.step_stride];
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] += x * row[v];
      }
    }
  }
  for (int r = 0; r < kPanelRows; ++r) {
    V* const to = reinterpret_cast<V*>(c + r * c_stride);
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAccumulate) {
        sum[r][v] += keep == nullptr ? to[v] : keep[r] * to[v];
      }
      to[v] = sum[r][v];
    }
  }
}

// Longer sums are added in parts, because rounding errors grow with the length of a sum.
inline constexpr int kLongestSum = 128;

// The same for any number of rows (a multiple of kPanelRows) and up to kPanelVectors vectors.
template <bool kAccumulate, class T>
inline void multiply(Factor<T> a, int rows, T const* b, int vectors, int depth, T* c,
                     int64_t c_stride, T const* keep = nullptr) {
  with_vectors(vectors, [&](auto count) {
    for (int r = 0; r < rows; r += kPanelRows) {
      Factor<T> block{a.data + r * a.row_stride, a.row_stride, a.step_stride};
      T* const to = c + r * c_stride;
      int const first = depth < kLongestSum ? depth : kLongestSum;
      multiply_block<kAccumulate, count.value>(block, b, first, to, c_stride,
                                               keep == nullptr ? nullptr : keep + r);
      for (int step = kLongestSum; step < depth; step += kLongestSum) {
        block.data += kLongestSum * a.step_stride;
        int const next = depth - step < kLongestSum ? depth - step : kLongestSum;
        T const* const rows_of_b = b + static_cast<int64_t>(step) * kPanel<T>;
        multiply_block<true, count.value, T>(block, rows_of_b, next, to, c_stride, nullptr);
      }
    }
  });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
