// Masks of window mechanisms on a grid, computed by a warp while the copies run.
//
// A window is an interval on each axis, and rows with the same coordinate share that interval. For
// every partial tile, one warp finds the key columns inside each interval and writes them to shared
// memory as bit words. What a row of a consumer sees is the AND of three words.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/geometry/grid/grid_walk.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct WindowWords {
  // The sides of a query tile are powers of two. Their sum is largest when two of them are 1.
  static constexpr int kSides = Traits::kTileQ + 2;
  // Twice as many masks as stages: one is written while its stage is still in use.
  static constexpr int kMasks = 2 * Traits::kStages;

  PrefixTable<Traits::kTileK> table;
  Interval windows[kSides];                // of each coordinate, axis by axis
  LaneColumns inside[kMasks + 1][kSides];  // the key columns in each window; the last mask has all

  // Index of a stage's mask.
  static __device__ __forceinline__ int mask_of(RingState<Traits::kStages> const& place) {
    return static_cast<int>(place.phase) * Traits::kStages + place.index;
  }
};

// For the mask warp. Params: parameters of a kernel on a grid.
template <class Traits, class Mechanism, class Params>
struct WindowMasks {
  using Words = WindowWords<Traits>;

  Params const& params;
  Words& words;

  // Called by all threads of the block, which synchronize afterwards.
  __device__ __forceinline__ void init() const {
    words.table.fill(params.geometry.shape.k, params.geometry.k_bits);
    for (int i = threadIdx.x; i < Words::kSides; i += blockDim.x) {
      words.inside[Words::kMasks][i] = words.table.first(Traits::kTileK);
    }
  }

  // Computes the windows of a query tile.
  template <class Work>
  __device__ __forceinline__ void find_windows(Work const& work) const {
    Coord const& side = params.geometry.shape.q;
    __syncwarp();  // the last query tile's windows have been read
    CUTE_NO_UNROLL
    for (int i = threadIdx.x % 32; i < sides(); i += 32) {
      int const axis = axis_of(i);
      int const from = axis == 0 ? 0 : axis == 1 ? side[0] : side[0] + side[1];
      words.windows[i] = Mechanism::window(params.sparsity, axis, pick(work.length, axis),
                                           pick(work.q.origin, axis) + i - from);
    }
    __syncwarp();
  }

  // Computes which key columns of a box are in each window.
  __device__ __forceinline__ void publish(KeyBox const& box,
                                          RingState<Traits::kStages> const& place) const {
    auto const& g = params.geometry;
    auto* const inside = words.inside[Words::mask_of(place)];
    if (box.extra) {
      LaneColumns const columns = words.table.first(g.extra_len - box.origin[2]);
      for (int i = threadIdx.x % 32; i < sides(); i += 32) {
        inside[i] = columns;
      }
      return;  // not a branch of the ?: below, both sides of which would be evaluated
    }
    Coord const entries = words.table.entries(g.shape.k);
    CUTE_NO_UNROLL
    for (int i = threadIdx.x % 32; i < sides(); i += 32) {
      int const axis = axis_of(i);
      auto clip = [&](int position) {
        return min(max(position - pick(box.origin, axis), 0), pick(g.shape.k, axis));
      };
      Interval const window = words.windows[i];
      inside[i] = words.table.between(pick(entries, axis), clip(window.begin), clip(window.end));
    }
  }

 private:
  __device__ __forceinline__ int sides() const {
    Coord const& side = params.geometry.shape.q;
    return side[0] + side[1] + side[2];
  }
  __device__ __forceinline__ int axis_of(int i) const {
    Coord const& side = params.geometry.shape.q;
    return i < side[0] ? 0 : i < side[0] + side[1] ? 1 : 2;
  }
};

// For a thread of a consumer: what its two rows see.
template <class Traits>
class WindowRows {
 public:
  __device__ __forceinline__ WindowRows(WindowWords<Traits> const& words, Coord const& side,
                                        BoxBits const& bits, int warpgroup)
      : words_(words) {
    int row = warpgroup * 64 + AccumulatorPosition().row;
    asm volatile("" : "+r"(row));  // recomputed per query tile: nothing is kept across tiles
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      Coord const offset = bits.offset(row + 8 * r);
      auto word = [](int i) { return static_cast<uint32_t>(i * 4 + threadIdx.x % 4); };
      places_[r] = word(offset[0]) | word(side[0] + offset[1]) << kPlaceBits |
                   word(side[0] + side[1] + offset[2]) << 2 * kPlaceBits;
    }
  }

  // Bits of the thread's columns that each row sees, by the mask with this index.
  struct Seen {
    uint32_t bits[kRowsPerThread];
  };
  __device__ __forceinline__ Seen look_up(int mask) const {
    compiler_fence();
    auto const* const inside = words_.inside[mask][0].of;
    Seen seen;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      uint32_t places = places_[r];
      asm volatile("" : "+r"(places));  // keeps one register instead of three
      seen.bits[r] = 0xffffffff;
      CUTE_UNROLL
      for (int axis = 0; axis < kGridAxes; ++axis) {
        seen.bits[r] &= inside[places >> axis * kPlaceBits & ((1 << kPlaceBits) - 1)];
      }
    }
    __syncwarp();  // one lane releases the stage for all
    return seen;
  }

  static __device__ __forceinline__ bool sees(Seen const& seen, int i) {
    return seen.bits[AccumulatorPosition::row_of(i)] >> (i / 4 * 2 + i % 2) & 1;
  }
  // Whether the thread sees any column of its r-th row.
  static __device__ __forceinline__ bool sees_any(Seen const& seen, int r) {
    return seen.bits[r] != 0;
  }

 private:
  static constexpr int kPlaceBits = 10;
  static_assert(4 * WindowWords<Traits>::kSides <= 1 << kPlaceBits, "the number of a word fits");

  WindowWords<Traits> const& words_;
  uint32_t places_[kRowsPerThread];  // of a row's three words
};

}  // namespace sparse_fmha::sm90
