// Descriptors of tcgen05.mma: of matrices in shared memory, and of the instruction. Integer code,
// for host and device. No kernel uses it yet: docs/gpus.md.
//
// Sources: PTX ISA, "tcgen05 shared memory descriptor" and "tcgen05 instruction descriptor".
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha::sm100 {

// How 16-byte chunks are exchanged within eight rows. The names are bytes of a row.
enum class Swizzle : uint32_t { kNone = 0, k128 = 2, k64 = 4, k32 = 6 };

// Which index of a matrix is consecutive in memory: the depth that a product sums over, or the
// other one.
enum class Major : uint32_t { kDepth = 0, kOuter = 1 };

// Where a matrix lies. Offsets in bytes, multiples of 16; core matrices are eight rows of 16 bytes.
//
//              kDepth                          kOuter
//   leading    from 16 bytes of depth to the   from a swizzled row of outer indices to the next
//              next, without swizzle only      (without swizzle: from eight depths to the next)
//   stride     from eight outer indices to     from eight depths to the next (without swizzle:
//              the next                        from eight outer indices to the next)
struct Matrix {
  uint32_t address;  // in shared memory
  uint32_t leading;
  uint32_t stride;
  Swizzle swizzle;
};

SPARSE_FMHA_HD constexpr uint64_t matrix_descriptor(Matrix const& m) {
  constexpr uint64_t kBlackwell = 1;
  auto units = [](uint32_t bytes) { return uint64_t{bytes >> 4 & 0x3fff}; };
  return units(m.address) | units(m.leading) << 16 | units(m.stride) << 32 | kBlackwell << 46 |
         static_cast<uint64_t>(m.swizzle) << 61;
}

// A tile of 16-bit elements as TMA writes it with the 128-byte swizzle: panels of 64 columns, one
// after the other, whose rows are 128 bytes. A tile begins at a multiple of 1024 bytes, and has a
// multiple of eight rows.
struct Tile {
  static constexpr uint32_t kPanel = 64;  // columns
  static constexpr uint32_t kRow = 2 * kPanel;
  uint32_t address;
  uint32_t rows;
  uint32_t columns;
  SPARSE_FMHA_HD constexpr uint32_t panel_bytes() const { return rows * kRow; }
  SPARSE_FMHA_HD constexpr uint32_t bytes() const { return columns / kPanel * panel_bytes(); }
};

// The address of an element: chunks of eight elements are exchanged.
SPARSE_FMHA_HD constexpr uint32_t address_of(Tile const& tile, uint32_t row, uint32_t column) {
  uint32_t const within = column % Tile::kPanel;
  uint32_t const chunk = (within / 8) ^ (row % 8);
  return tile.address + column / Tile::kPanel * tile.panel_bytes() + row * Tile::kRow + chunk * 16 +
         within % 8 * 2;
}

// An instruction for 16-bit factors sums over 16 depths.
inline constexpr uint32_t kDepth = 16;

// Step s over the columns of a tile, whose rows are the outer index: queries and keys in Q K^T.
SPARSE_FMHA_HD constexpr Matrix step_of_columns(Tile const& tile, uint32_t s) {
  uint32_t const column = s * kDepth;
  return {tile.address + column / Tile::kPanel * tile.panel_bytes() + column % Tile::kPanel * 2, 16,
          8 * Tile::kRow, Swizzle::k128};
}

// Step s over the rows of a tile, whose columns are the outer index: values in P V. A single panel
// has no next one.
SPARSE_FMHA_HD constexpr Matrix step_of_rows(Tile const& tile, uint32_t s) {
  return {tile.address + s * kDepth * Tile::kRow,
          tile.columns > Tile::kPanel ? tile.panel_bytes() : 0, 8 * Tile::kRow, Swizzle::k128};
}

enum class Format : uint32_t { kFloat16 = 0, kBFloat16 = 1 };

// D = A B with 16-bit factors (kind::f16) and sums in fp32.
struct Product {
  Format format;
  uint32_t rows;     // of A and D: 64 or 128, 256 for two blocks
  uint32_t columns;  // of B and D: a multiple of 16, at most 256
  Major a = Major::kDepth;
  Major b = Major::kDepth;
  bool negate_a = false;  // for a negative scale
};

SPARSE_FMHA_HD constexpr bool is_valid(Product const& p) {
  return (p.rows == 64 || p.rows == 128 || p.rows == 256) && p.columns % 16 == 0 &&
         p.columns >= 16 && p.columns <= 256;
}

SPARSE_FMHA_HD constexpr uint32_t instruction_descriptor(Product const& p) {
  constexpr uint32_t kSumsFloat32 = 1;
  auto const format = static_cast<uint32_t>(p.format);
  return kSumsFloat32 << 4 | format << 7 | format << 10 | uint32_t{p.negate_a} << 13 |
         static_cast<uint32_t>(p.a) << 15 | static_cast<uint32_t>(p.b) << 16 | p.columns / 8 << 17 |
         p.rows / 16 << 24;
}

// The two products of attention: scores = Q K^T, and output += P V.
SPARSE_FMHA_HD constexpr Product scores_product(Format format, uint32_t keys, bool negate) {
  return {format, 128, keys, Major::kDepth, Major::kDepth, negate};
}
SPARSE_FMHA_HD constexpr Product output_product(Format format, uint32_t head_dim) {
  return {format, 128, head_dim, Major::kDepth, Major::kOuter};
}

}  // namespace sparse_fmha::sm100
