// Weights and the gradients of the scores.
#pragma once

#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/softmax.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Turns scores into weights p, and gradients of weights into p * (gradient - delta), the gradients
// of the scores, in panels [row][lane] of `kVectors` vectors. A weight of 0 has gradient 0 in any
// case: hidden pairs may have arbitrary values. lse and delta are functions of the row and the
// vector.
template <int kVectors, class T, class Lse, class Delta>
void weigh_gradients(T* scores, T* gradients, int rows, T scale_log2, Lse lse, Delta delta) {
  using V = Vector<T>;
  for (int row = 0; row < rows; ++row) {
    V* const of_row = reinterpret_cast<V*>(scores + row * kPanel<T>);
    V* const gradient = reinterpret_cast<V*>(gradients + row * kPanel<T>);
    for (int v = 0; v < kVectors; ++v) {
      V const x = of_row[v] * scale_log2 - lse(row, v);
      // Hidden pairs have no weight, even if lse is NaN.
      V const p = of_row[v] == -kInfinity<T> ? V{} : exp2<T>(x > T(0) ? V{} : x);
      of_row[v] = p;
      gradient[v] = p == T(0) ? V{} : p * (gradient[v] - delta(row, v));
    }
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
