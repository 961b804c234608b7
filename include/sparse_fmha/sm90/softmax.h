// Online softmax over the accumulator of one warpgroup, in log2 units.
#pragma once

#include <cute/tensor.hpp>

namespace sparse_fmha::sm90 {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A thread holds two rows of a 64-row accumulator, `lane / 4` and 8 below it in its warp's 16 rows;
// four neighbouring lanes share a row. Element i of the accumulator is column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2 of row (i / 2) % 2.
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

struct OnlineSoftmax {
  float const scale_log2;
  float row_max[kRowsPerThread];  // of the raw scores
  float row_sum[kRowsPerThread];  // this thread's share

  __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale_log2(scale) {
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0.f;
    }
  }

  // Replaces the scores by exp2(scale * (s - max)) and returns what the output so far is to be
  // multiplied with. kMasked: a row may not have seen any key yet.
  template <bool kMasked, class Scores>
  __device__ __forceinline__ void update(Scores& s, float (&rescale)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      float const previous = row_max[r];
      float high = s(2 * r);
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (AccumulatorPosition::row_of(i) == r) {
          high = fmaxf(high, s(i));
        }
      }
      high = reduce_quad(high, [](float a, float b) { return fmaxf(a, b); });
      row_max[r] = fmaxf(previous, high);
      float const reference = kMasked && row_max[r] == -INFINITY ? 0.f : row_max[r];
      rescale[r] = exp2_approx((previous - reference) * scale_log2);
      row_sum[r] *= rescale[r];
      float const offset = reference * scale_log2;
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (AccumulatorPosition::row_of(i) == r) {
          s(i) = exp2_approx(fmaf(s(i), scale_log2, -offset));
          row_sum[r] += s(i);
        }
      }
    }
  }

  // Completes the sums. Afterwards `rescale` normalises the output and `lse` is its natural
  // log-sum-exp; a row without keys gets zero and -inf.
  __device__ __forceinline__ void finish(float (&rescale)[kRowsPerThread],
                                         float (&lse)[kRowsPerThread]) {
    constexpr float kLn2 = 0.69314718055994530942f;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      float const sum = reduce_quad(row_sum[r], [](float a, float b) { return a + b; });
      bool const empty = sum == 0.f;
      rescale[r] = empty ? 0.f : 1.f / sum;
      lse[r] = empty ? -INFINITY : (row_max[r] * scale_log2 + log2f(sum)) * kLn2;
    }
  }
};

template <class Output>
__device__ __forceinline__ void rescale_rows(Output& o, float const (&rescale)[kRowsPerThread]) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(o); ++i) {
    o(i) *= rescale[AccumulatorPosition::row_of(i)];
  }
}

}  // namespace sparse_fmha::sm90
