// Masks of window mechanisms on a grid, computed by all threads one tile ahead.
//
// A window is an interval on each axis, and rows with the same coordinate share that interval. For
// every partial tile, the threads find the key columns inside each interval and write them to
// shared memory as bit words. What a row sees is the AND of three words.
#pragma once

#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/sm80/geometry/contract.h"

namespace sparse_fmha::sm80 {

template <class Traits>
struct WindowWords {
  // The sides of a query tile are powers of two. Their sum is largest when two of them are 1.
  static constexpr int kSides = Traits::kTileQ + 2;

  PrefixTable<Traits::kTileK> table;
  LaneColumns inside[2][kSides];  // of this tile and the next: the key columns in each window
  Interval windows[kSides];       // of each coordinate, axis by axis
};

// Calls body(i, axis, coordinate) for the sides of a query tile, which all threads share out.
template <class Body>
__device__ __forceinline__ void visit_sides(Coord const& side, Body const& body) {
  CUTE_NO_UNROLL
  for (int i = threadIdx.x; i < side[0] + side[1] + side[2]; i += blockDim.x) {
    int const axis = i < side[0] ? 0 : i < side[0] + side[1] ? 1 : 2;
    body(i, axis, i - (axis == 0 ? 0 : axis == 1 ? side[0] : side[0] + side[1]));
  }
}

// Computes the windows of a query tile.
template <class Mechanism, class Words>
__device__ __forceinline__ void find_windows(Words& words,
                                             typename Mechanism::Params const& sparsity,
                                             Coord const& side, QueryTile const& q,
                                             Coord const& length) {
  visit_sides(side, [&](int i, int axis, int coordinate) {
    words.windows[i] =
        Mechanism::window(sparsity, axis, pick(length, axis), pick(q.origin, axis) + coordinate);
  });
}

// The mask of tile i: the columns of a box that are in each window.
template <class Traits>
__device__ __forceinline__ void show_windows(WindowWords<Traits>& words, TileShape const& shape,
                                             Coord const& origin, int i) {
  Coord const entries = words.table.entries(shape.k);
  visit_sides(shape.q, [&](int side, int axis, int /*coordinate*/) {
    auto clip = [&](int position) {
      return min(max(position - pick(origin, axis), 0), pick(shape.k, axis));
    };
    Interval const window = words.windows[side];
    words.inside[i % 2][side] =
        words.table.between(pick(entries, axis), clip(window.begin), clip(window.end));
  });
}
// The mask of tile i: its first n columns, for every row.
template <class Traits>
__device__ __forceinline__ void show_first(WindowWords<Traits>& words, Coord const& side, int n,
                                           int i) {
  LaneColumns const columns = words.table.first(n);
  visit_sides(side,
              [&](int s, int /*axis*/, int /*coordinate*/) { words.inside[i % 2][s] = columns; });
}

// For a thread: what its two rows see.
template <class Traits>
class WindowRows {
 public:
  __device__ __forceinline__ WindowRows(WindowWords<Traits> const& words, Coord const& side,
                                        BoxBits const& bits, int row)
      : words_(words), side_(side), bits_(bits), row_(row) {}

  using Seen = SeenColumns;
  __device__ __forceinline__ Seen look_up(int i) const {
    auto const* const inside = words_.inside[i % 2];
    Seen seen;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      Coord const offset = bits_.offset(row_ + 8 * r);
      int const lane = threadIdx.x % 4;
      seen.bits[r] = inside[offset[0]].of[lane] & inside[side_[0] + offset[1]].of[lane] &
                     inside[side_[0] + side_[1] + offset[2]].of[lane];
    }
    return seen;
  }
  static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

 private:
  WindowWords<Traits> const& words_;
  Coord const& side_;
  BoxBits const& bits_;
  int const row_;
};

}  // namespace sparse_fmha::sm80
