// Which columns of a key box lie inside a window, as bit masks from a table in shared memory.
//
// A thread holds the same columns of every score tile. For each axis and each coordinate v the
// table has, as one word, which of them have a coordinate below v; the columns inside an interval
// are then two words apart, those inside a window three such pairs, whatever the rank.
#pragma once

#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/softmax.h"
#include "sparse_fmha/sparsity/contract.h"

namespace sparse_fmha::sm90 {

// box_offset() for a box with powers of two on the sides.
struct BoxBits {
  int32_t y;  // log2 of the extents
  int32_t x;
  SPARSE_FMHA_HD Coord offset(int32_t row) const {
    return {row >> (x + y), (row >> x) & ((1 << y) - 1), row & ((1 << x) - 1)};
  }
};

template <int kColumns>
class PrefixTable {
 public:
  static_assert(kColumns <= 128, "a thread's columns are the bits of one word");

  // All threads of the block call this, and synchronise afterwards.
  __device__ __forceinline__ void fill(Coord const& extent, BoxBits const& bits) {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
      int const quad = i % 4;
      int v = i / 4;
      int axis = 0;
      CUTE_UNROLL
      for (int a = 0; a < kGridAxes; ++a) {
        bool const behind = axis == a && v > extent[a];
        v -= behind ? extent[a] + 1 : 0;
        axis += behind;
      }
      uint32_t word = 0;
      for (int bit = 0; axis < kGridAxes && bit < kColumns / 4; ++bit) {
        int const column = bit / 2 * 8 + quad * 2 + bit % 2;
        Coord const c = bits.offset(column);
        word |= uint32_t((axis == 0 ? c[0] : axis == 1 ? c[1] : c[2]) < v) << bit;
      }
      words_[i] = word;
    }
  }

  // Columns of the box at `origin` that lie in the window.
  __device__ __forceinline__ uint32_t inside(Interval const (&window)[kGridAxes],
                                             Coord const& origin, Coord const& extent) const {
    uint32_t seen = 0xffffffff;
    int axis_words = 0;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      int const low = min(max(window[axis].begin - origin[axis], 0), extent[axis]);
      int const high = min(max(window[axis].end - origin[axis], 0), extent[axis]);
      seen &= word(axis_words + high) & ~word(axis_words + low);
      axis_words += extent[axis] + 1;
    }
    return seen;
  }

  // The first n columns.
  __device__ __forceinline__ uint32_t first(int n) const {
    uint32_t seen = 0;
    int const quad = threadIdx.x % 4;
    CUTE_UNROLL
    for (int bit = 0; bit < kColumns / 4; ++bit) {
      seen |= uint32_t(bit / 2 * 8 + quad * 2 + bit % 2 < n) << bit;
    }
    return seen;
  }

 private:
  __device__ __forceinline__ uint32_t word(int entry) const {
    return words_[entry * 4 + threadIdx.x % 4];
  }

  // Sides of powers of two add up to most when two of them are 1.
  static constexpr int kWords = 4 * (kColumns + 1 + 2 + 2);
  uint32_t words_[kWords];
};

}  // namespace sparse_fmha::sm90
