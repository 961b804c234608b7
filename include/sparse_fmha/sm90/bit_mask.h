// Masks of a score tile as bits: which of its columns each of a thread's rows sees.
#pragma once

#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/softmax.h"

namespace sparse_fmha::sm90 {

// In the order of the columns, so that the words are those of a mask in memory.
template <int kColumns>
class ColumnBits {
 public:
  static constexpr int kWords = kColumns / 32;
  static_assert(kColumns % 32 == 0, "whole words of columns");

  // Columns [32 * word, 32 * word + 32) of one of the thread's rows.
  __device__ __forceinline__ void set(int row, int word, uint32_t bits) {
    words_[row][word] = bits >> AccumulatorPosition().column;
  }
  template <class Scores>
  __device__ __forceinline__ void apply(Scores& scores) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      int const column = AccumulatorPosition::column_of(i);
      if ((words_[AccumulatorPosition::row_of(i)][column / 32] >> (column % 32) & 1) == 0) {
        scores(i) = -INFINITY;
      }
    }
  }

 private:
  uint32_t words_[kRowsPerThread][kWords];  // from the thread's first column on
};

}  // namespace sparse_fmha::sm90
