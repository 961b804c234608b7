// The inner product that both matrix products of attention are made of.
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

// c[kPanelRows][kVectors] (+)= a[kPanelRows][depth] * b[depth][kVectors], in registers throughout.
// The rows of b are kPanel apart.
template <bool kAccumulate, int kVectors, class T>
inline void multiply_block(Factor<T> a, T const* b, int depth, T* c, int64_t c_stride) {
  using V = Vector<T>;
  V sum[kPanelRows][kVectors];
  for (int r = 0; r < kPanelRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kAccumulate ? reinterpret_cast<V const*>(c + r * c_stride)[v] : V{};
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
    for (int v = 0; v < kVectors; ++v) {
      reinterpret_cast<V*>(c + r * c_stride)[v] = sum[r][v];
    }
  }
}

// The same for any number of rows (a multiple of kPanelRows) and of vectors up to kPanelVectors.
template <bool kAccumulate, class T>
inline void multiply(Factor<T> a, int rows, T const* b, int vectors, int depth, T* c,
                     int64_t c_stride) {
  with_vectors(vectors, [&](auto count) {
    for (int r = 0; r < rows; r += kPanelRows) {
      multiply_block<kAccumulate, count.value>(
          {a.data + r * a.row_stride, a.row_stride, a.step_stride}, b, depth, c + r * c_stride,
          c_stride);
    }
  });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
