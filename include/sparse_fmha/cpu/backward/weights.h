// Weights of scores, and the gradients of the scores.
#pragma once

#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/softmax.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Turns scores into weights p, and gradients of weights into p * (gradient - delta), those of the
// scores, in panels [row][lane] of `kVectors` vectors. A weight of 0 has a gradient of 0 whatever
// was found for it: hidden pairs may have met any numbers. lse and delta are functions of the row
// and the vector.
template <int kVectors, class T, class Lse, class Delta>
void weigh_gradients(T* scores, T* gradients, int rows, T scale_log2, Lse lse, Delta delta) {
  using V = Vector<T>;
  for (int row = 0; row < rows; ++row) {
    V* const of_row = reinterpret_cast<V*>(scores + row * kPanel<T>);
    V* const gradient = reinterpret_cast<V*>(gradients + row * kPanel<T>);
    for (int v = 0; v < kVectors; ++v) {
      V const x = of_row[v] * scale_log2 - lse(row, v);
      // Also where lse is no number, hidden pairs have no weight.
      V const p = of_row[v] == -kInfinity<T> ? V{} : exp2<T>(x > T(0) ? V{} : x);
      of_row[v] = p;
      gradient[v] = p == T(0) ? V{} : p * (gradient[v] - delta(row, v));
    }
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
