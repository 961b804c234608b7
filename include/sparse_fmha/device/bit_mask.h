// Masks of a score tile as bits: which of its columns each of a thread's rows sees.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

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
  // Whether the i-th element of the accumulator is in one of them.
  __device__ __forceinline__ bool sees(int i) const {
    int const column = AccumulatorPosition::column_of(i);
    return words_[AccumulatorPosition::row_of(i)][column / 32] >> (column % 32) & 1;
  }

 private:
  uint32_t words_[kRowsPerThread][kWords];  // from the thread's first column on
};

}  // namespace sparse_fmha::device
