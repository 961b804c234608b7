// Online softmax over scores stored [key][query lane], in log2 units.
#pragma once

#include "sparse_fmha/cpu/vector.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class T>
inline constexpr T kInfinity = __builtin_inf();
template <class T>
inline constexpr T kLargest = sizeof(T) == 4 ? __FLT_MAX__ : static_cast<T>(__DBL_MAX__);

// The largest score of each row, for `kVectors` vectors of rows in a panel.
template <class T, int kVectors>
void row_tops(T const* scores, int keys, Vector<T>* top) {
  Vector<T> most[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    most[v] = broadcast(-kInfinity<T>);
  }
  for (int key = 0; key < keys; ++key) {
    auto const* const of_key = reinterpret_cast<Vector<T> const*>(scores + key * kPanel<T>);
    for (int v = 0; v < kVectors; ++v) {
      most[v] = max(most[v], of_key[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    top[v] = most[v];
  }
}

// Turns scores into weights relative to the running maximum and adds them to the running sum.
// `rescale` is the factor for the output so far.
template <class T, int kVectors>
void update_softmax(T* scores, int keys, T scale_log2, T* running_max, T* running_sum,
                    T* running_rescale) {
  using V = Vector<T>;
  V* const max_seen = reinterpret_cast<V*>(running_max);
  V* const sum = reinterpret_cast<V*>(running_sum);
  V top[kVectors];
  row_tops<T, kVectors>(scores, keys, top);
  V base[kVectors];
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    // Finite, so that neither a row without keys nor an overflow computes inf - inf.
    V const most = max(max_seen[v], top[v]);
    V const bounded = most > kLargest<T> ? broadcast(kLargest<T>) : most;
    base[v] = bounded < -kLargest<T> ? V{} : bounded;
    V const rescale = exp2<T>((max_seen[v] - base[v]) * scale_log2);
    reinterpret_cast<V*>(running_rescale)[v] = rescale;
    sum[v] *= rescale;
    max_seen[v] = bounded;
    total[v] = V{};
  }
  for (int key = 0; key < keys; ++key) {
    V* const of_key = reinterpret_cast<V*>(scores + key * kPanel<T>);
    for (int v = 0; v < kVectors; ++v) {
      V const x = (of_key[v] - base[v]) * scale_log2;
      of_key[v] = exp2<T>(x > T(0) ? V{} : x);
      total[v] += of_key[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    sum[v] += total[v];
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
