// Which columns of a key box lie inside a window, as bitmasks from a table in shared memory.
//
// A thread holds the same columns of every score tile. For each axis and each coordinate v, the
// table has one word of the columns whose coordinate is below v, so the columns inside an interval
// are the difference of two words. Rows of a query tile with the same coordinate share an interval.
// A warp computes their words for each key tile, and a row sees the AND of three of them.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/cute.h"
#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::device {

// c[axis] for an axis known only at run time, without moving Coords out of registers.
SPARSE_FMHA_HD int32_t pick(Coord const& c, int axis) {
  return axis == 0 ? c[0] : axis == 1 ? c[1] : c[2];
}

// box_offset() for a box whose sides are powers of two.
struct BoxBits {
  int32_t y;  // log2 of the extents
  int32_t x;
  SPARSE_FMHA_HD Coord offset(int32_t row) const {
    return {row >> (x + y), (row >> x) & ((1 << y) - 1), row & ((1 << x) - 1)};
  }
};

// One bit for each column that a thread holds, for four neighboring lanes. The other lanes hold the
// same columns.
struct alignas(16) LaneColumns {
  uint32_t of[4];
};

template <int kColumns>
class PrefixTable {
 public:
  static_assert(kColumns <= 128, "a thread's columns are the bits of one word");

  // Called by all threads of the block, which synchronize afterwards.
  __device__ __forceinline__ void fill(Coord const& extent, BoxBits const& bits) {
    for (int i = threadIdx.x; i < 4 * kEntries; i += blockDim.x) {
      int const lane = i % 4;
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
        int const column = bit / 2 * 8 + lane * 2 + bit % 2;
        Coord const c = bits.offset(column);
        word |= uint32_t(pick(c, axis) < v) << bit;
      }
      entries_[i / 4].of[lane] = word;
    }
  }

  // Index of the first entry of each axis.
  static __device__ __forceinline__ Coord entries(Coord const& extent) {
    return {0, extent[0] + 1, extent[0] + extent[1] + 2};
  }
  // Columns with a coordinate in [low, high) on the axis whose entries begin at `entry`.
  __device__ __forceinline__ LaneColumns between(int entry, int low, int high) const {
    LaneColumns const below_low = entries_[entry + low];
    LaneColumns const below_high = entries_[entry + high];
    LaneColumns result;
    CUTE_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
      result.of[lane] = below_high.of[lane] & ~below_low.of[lane];
    }
    return result;
  }

  // The first n columns.
  static __device__ __forceinline__ LaneColumns first(int n) {
    LaneColumns result;
    CUTE_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
      result.of[lane] = 0;
      CUTE_UNROLL
      for (int bit = 0; bit < kColumns / 4; ++bit) {
        result.of[lane] |= uint32_t(bit / 2 * 8 + lane * 2 + bit % 2 < n) << bit;
      }
    }
    return result;
  }

 private:
  // For sides that are powers of two the sum is largest when two of them are 1.
  static constexpr int kEntries = kColumns + 1 + 2 + 2;
  LaneColumns entries_[kEntries];
};

}  // namespace sparse_fmha::device
