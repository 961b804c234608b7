// Masks of a score tile as bits: the columns that each of a thread's rows sees.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {

// Bits are in the order of the columns, so words are the same as those of a mask in memory.
template <int kColumns>
class ColumnBits {
 public:
  static constexpr int kWords = kColumns / 32;
  static_assert(kColumns % 32 == 0, "whole words of columns");

  // Sets columns [32 * word, 32 * word + 32) of one of the thread's rows.
  __device__ __forceinline__ void set(int row, int word, uint32_t bits) {
    words_[row][word] = bits >> AccumulatorPosition().column;
  }
  // Drops the first columns, whole words.
  __device__ __forceinline__ void pass_over(int columns) {
    for (; columns > 0; columns -= 32) {
      CUTE_UNROLL
      for (int word = 0; word < kWords; ++word) {
        CUTE_UNROLL
        for (int row = 0; row < kRowsPerThread; ++row) {
          words_[row][word] = word + 1 < kWords ? words_[row][word + 1] : 0;
        }
      }
    }
  }
  // Whether the row of the accumulator's i-th element sees its column.
  __device__ __forceinline__ bool sees(int i) const {
    int const column = AccumulatorPosition::column_of(i);
    return words_[AccumulatorPosition::row_of(i)][column / 32] >> (column % 32) & 1;
  }

 private:
  uint32_t words_[kRowsPerThread][kWords];  // shifted to the thread's first column
};

}  // namespace sparse_fmha::device
