// Where a warp's fragments of matrix instructions lie in tiles in shared memory. Integer code, for
// host and device.
//
// Names of registers are those of device/mma_tile.h. A load of four matrices of 8 x 8 takes one
// row's address from each lane, eight lanes for a matrix.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha::sm80 {

// A chunk of eight elements of a row.
struct Chunk {
  int row;
  int chunk;
};

// 16 rows by 16 depths of a tile, as left factor; or as depths by columns, two right factors whose
// matrices are transposed.
SPARSE_FMHA_HD constexpr Chunk left_chunk(int lane) { return {lane % 16, lane / 16}; }
// 16 rows by 16 depths of a tile whose rows are columns of the product: two right factors.
SPARSE_FMHA_HD constexpr Chunk right_chunk(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// Index of a chunk of a row of kDim elements. The same chunk of eight rows is in 32 different
// banks. Two rows of 32 elements are one line of memory.
template <int kDim>
SPARSE_FMHA_HD constexpr int swizzled(Chunk const& at) {
  static_assert(kDim == 32 || kDim % 64 == 0, "a line has eight chunks");
  if constexpr (kDim == 32) {
    int const line = at.row / 2;
    return line * 64 + ((at.row % 2 * 4 + at.chunk) ^ (line % 8)) * 8;
  } else {
    return at.row * kDim + (at.chunk ^ (at.row % 8)) * 8;
  }
}

// The address of the chunk that is 16 * step elements further in its row than one of the row's
// first two chunks. Tiles begin at multiples of 128 bytes.
SPARSE_FMHA_HD constexpr uint32_t advanced(uint32_t address, int step) {
  return (address ^ static_cast<uint32_t>(step % 4 * 32)) + static_cast<uint32_t>(step / 4 * 128);
}

}  // namespace sparse_fmha::sm80
