// A factor of the sums of which each warp has its own columns in registers, and reads the others
// from the warp with the same rows.
#pragma once

#include "sparse_fmha/sm80/backward/products.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"

namespace sparse_fmha::sm80 {

template <class Traits>
class Halves {
 public:
  using Element = typename Traits::Element;
  static constexpr int kSteps = Traits::kWarpColumns / 16;

  // Rounds a part of a warp's columns.
  template <int kColumns>
  __device__ __forceinline__ void take(Sums<Traits::kBlocks, kColumns> const& from, int part) {
    CUTE_UNROLL
    for (int s = 0; s < kColumns / 16; ++s) {
      CUTE_UNROLL
      for (int b = 0; b < Traits::kBlocks; ++b) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          own_[part * (kColumns / 16) + s][b][r] =
              from.template pair<Element>(b, 2 * s + r / 2, r % 2);
        }
      }
    }
  }
  __device__ __forceinline__ void clear() {
    CUTE_UNROLL
    for (int i = 0; i < kSteps * Traits::kBlocks * 4; ++i) {
      own_[i / 4 / Traits::kBlocks][i / 4 % Traits::kBlocks][i % 4] = 0;
    }
  }
  // Stores them to a tile of all rows and columns. Here and below, addresses are computed where
  // they are used, and take registers only there. A chunk's address is one exclusive or away from
  // the first one's.
  __device__ __forceinline__ void store(Element* tile, WarpPart<Traits> const& warp) const {
    // Of rows that are eight apart and 32 long, the chunks are in each other's half of a line.
    constexpr uint32_t kFlip = Traits::kColumns == 32 ? 64 : 0;
    int const lane = again(warp.lane);
    Chunk const first = {warp.first_row() + lane / 4, again(warp.columns) * kSteps * 2};
    uint32_t const to = address_of<Traits::kColumns>(tile, first) + lane % 4 * 4;
    CUTE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      CUTE_UNROLL
      for (int b = 0; b < Traits::kBlocks; ++b) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          int const row = 16 * b + 8 * (r % 2);
          asm volatile(
              "st.shared.b32 [%0], %1;" ::"r"((advanced(to, s) ^ (r / 2 * 16 + r % 2 * kFlip)) +
                                              row * Traits::kColumns * 2),
              "r"(own_[s][b][r])
              : "memory");
        }
      }
    }
  }
  // sums += the warp's columns x their rows of a tile that passes.
  __device__ __forceinline__ void multiply_own(
      Element const* passing, WarpPart<Traits> const& warp,
      Sums<Traits::kBlocks, Traits::kWarpDim>& sums) const {
    multiply(passing, warp, again(warp.columns), sums,
             [&](int s, uint32_t (&to)[Traits::kBlocks][4]) {
               CUTE_UNROLL
               for (int i = 0; i < Traits::kBlocks * 4; ++i) {
                 to[i / 4][i % 4] = own_[s][i / 4][i % 4];
               }
             });
  }
  // sums += the other columns x their rows. They have been stored to `tile`.
  static __device__ __forceinline__ void multiply_other(
      Element const* tile, Element const* passing, WarpPart<Traits> const& warp,
      Sums<Traits::kBlocks, Traits::kWarpDim>& sums) {
    static_assert(Traits::kSharing == 2, "one other warp has the same rows");
    int const other = 1 - again(warp.columns);
    Element const* const rows = tile + warp.first_row() * Traits::kColumns;
    uint32_t const address =
        advanced(address_of<Traits::kColumns>(rows, left_chunk(again(warp.lane))), other * kSteps);
    multiply(passing, warp, other, sums, [&](int s, uint32_t (&to)[Traits::kBlocks][4]) {
      CUTE_UNROLL
      for (int b = 0; b < Traits::kBlocks; ++b) {
        load_four(advanced(address, s) + b * 16 * Traits::kColumns * 2, to[b]);
      }
    });
  }

 private:
  uint32_t own_[kSteps][Traits::kBlocks][4];

  // get(s, to): fragments of step s of a part of the columns.
  template <class Get>
  static __device__ __forceinline__ void multiply(Element const* passing,
                                                  WarpPart<Traits> const& warp, int part,
                                                  Sums<Traits::kBlocks, Traits::kWarpDim>& sums,
                                                  Get const& get) {
    uint32_t const address = address_of<Traits::kRowDim>(
        passing + part * Traits::kWarpColumns * Traits::kRowDim, left_chunk(again(warp.lane)));
    int const first = again(warp.columns) * (Traits::kWarpDim / 16);
    CUTE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[Traits::kBlocks][4];
      get(s, a);
      CUTE_UNROLL
      for (int n = 0; n < Traits::kWarpDim / 16; ++n) {
        uint32_t b[4];
        uint32_t const column = Traits::kWarpDim % 64 == 0 ? advanced(address, n) + first * 32
                                                           : advanced(address, first + n);
        load_four_transposed(column + s * 16 * Traits::kRowDim * 2, b);
        multiply_add<Element>(a, b, 2 * n, sums);
      }
    }
  }
};

}  // namespace sparse_fmha::sm80
