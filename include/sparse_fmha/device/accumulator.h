// A warpgroup's accumulator of scores: which elements a thread holds, and row-wise operations on
// them.
#pragma once

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

// A thread holds two rows of a 64-row accumulator: rows `lane / 4` and `lane / 4 + 8` of its warp's
// 16. Four neighboring lanes share a row. Element i of the accumulator is column 8 * (i / 4) + 2 *
// (lane % 4) + i % 2 of row (i / 2) % 2.
inline constexpr int kRowsPerThread = 2;

struct AccumulatorPosition {
  int row;     // of the thread's first row, within the warpgroup's 64
  int column;  // of the thread's first element
  __device__ __forceinline__ AccumulatorPosition()
      : row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4), column(threadIdx.x % 4 * 2) {}
  static constexpr __device__ int row_of(int i) { return i / 2 % 2; }
  static constexpr __device__ int column_of(int i) { return i / 4 * 8 + i % 2; }
};

template <class Op>
__device__ __forceinline__ float reduce_quad(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffff, x, 2));
  return op(x, __shfl_xor_sync(0xffffffff, x, 1));
}

// Reduces a thread's elements of each row, in two chains per row to shorten the dependence.
template <class Scores, class Op>
__device__ __forceinline__ void fold_rows(Scores const& s, float (&result)[kRowsPerThread], Op op) {
  float chain[4] = {s(0), s(1), s(2), s(3)};
  CUTE_UNROLL
  for (int i = 4; i < cute::size(s); ++i) {
    chain[i % 4] = op(chain[i % 4], s(i));
  }
  result[0] = op(chain[0], chain[1]);
  result[1] = op(chain[2], chain[3]);
}

// hide(i, x) is x, or -inf if a mask hides the i-th score.
template <class Scores, class Hide>
__device__ __forceinline__ void hide_scores(Scores& s, Hide hide) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(s); ++i) {
    s(i) = hide(i, s(i));
  }
}

struct HideNone {
  __device__ __forceinline__ float operator()(int /*i*/, float x) const { return x; }
};

// What a mask hides, given what was looked up; nothing if the tile has no mask.
template <bool kMasked = true, class Mask, class Seen>
__device__ __forceinline__ auto hidden_by(Mask const& mask, Seen const& seen) {
  if constexpr (kMasked) {
    return [&](int i, float x) { return mask.sees(seen, i) ? x : -INFINITY; };
  } else {
    return HideNone{};
  }
}

// Whether the thread sees any score of row r.
template <bool kMasked = true, class Mask, class Seen>
__device__ __forceinline__ auto seen_by(Mask const& mask, Seen const& seen) {
  if constexpr (kMasked) {
    return [&](int r) { return mask.sees_any(seen, r); };
  } else {
    return [](int /*r*/) { return true; };
  }
}

template <class Matrix>
__device__ __forceinline__ void rescale_rows(Matrix& m, float const (&rescale)[kRowsPerThread]) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(m); ++i) {
    m(i) *= rescale[AccumulatorPosition::row_of(i)];
  }
}

}  // namespace sparse_fmha::device
