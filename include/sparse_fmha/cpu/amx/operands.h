// Operands of bf16 in memory as tile registers take them: whole tiles, padded with zeros.
#pragma once

#include "sparse_fmha/cpu/amx/registers.h"
#include "sparse_fmha/cpu/pairs.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

inline constexpr int kTilePairs = kTileRowBytes / sizeof(Pair);

// The left operand of a product: tile (i, k), 16 rows of 16 pairs along the sum, begins at
// data[i * tile_stride + k * step_stride].
struct LeftTiles {
  Pair const* data;
  int64_t row_stride;
  int64_t tile_stride;
  int64_t step_stride;
};

// Pairs of b[pair][lane] -> [lane][pair], 16 of each.
inline void transpose(__m512i* rows) {
  constexpr int kAll = -1;  // GCC 12 warns about the functions without a mask
  __m512i x[kTilePairs];
#pragma GCC unroll 4
  for (int i = 0; i < kTilePairs; i += 4) {
    __m512i const a = _mm512_maskz_unpacklo_epi32(kAll, rows[i], rows[i + 1]);
    __m512i const b = _mm512_maskz_unpackhi_epi32(kAll, rows[i], rows[i + 1]);
    __m512i const c = _mm512_maskz_unpacklo_epi32(kAll, rows[i + 2], rows[i + 3]);
    __m512i const d = _mm512_maskz_unpackhi_epi32(kAll, rows[i + 2], rows[i + 3]);
    x[i] = _mm512_maskz_unpacklo_epi64(kAll, a, c);
    x[i + 1] = _mm512_maskz_unpackhi_epi64(kAll, a, c);
    x[i + 2] = _mm512_maskz_unpacklo_epi64(kAll, b, d);
    x[i + 3] = _mm512_maskz_unpackhi_epi64(kAll, b, d);
  }
  // x[4 * i + j], quarter l: pairs 4 * i to 4 * i + 3 of lane 4 * l + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i const a = _mm512_maskz_shuffle_i32x4(kAll, x[j], x[4 + j], 0x88);
    __m512i const b = _mm512_maskz_shuffle_i32x4(kAll, x[8 + j], x[12 + j], 0x88);
    __m512i const c = _mm512_maskz_shuffle_i32x4(kAll, x[j], x[4 + j], 0xdd);
    __m512i const d = _mm512_maskz_shuffle_i32x4(kAll, x[8 + j], x[12 + j], 0xdd);
    rows[j] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x88);
    rows[8 + j] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xdd);
    rows[4 + j] = _mm512_maskz_shuffle_i32x4(kAll, c, d, 0x88);
    rows[12 + j] = _mm512_maskz_shuffle_i32x4(kAll, c, d, 0xdd);
  }
}

template <>
struct Operands<BFloat16> {
  using T = float;
  using In = Pair;
  using Left = LeftTiles;
  static constexpr int kTileElements = kTilePairs * kSteps<Pair>;

  static constexpr int numbers(int dim) { return round_up(dim, kTileElements) / kSteps<Pair>; }
  static Left rows(In const* data, int numbers) {
    return {data, numbers, int64_t{kTileRows} * numbers, kTilePairs};
  }
  static void load_row(BFloat16 const* from, int count, In* to) {
    PairOperands::load_row(from, count, to);
    for (int i = count / kSteps<Pair>; i < numbers(count); ++i) {
      to[i] = In{};
    }
  }
  static void load_lane(BFloat16 const* from, int count, T factor, In* to) {
    PairOperands::load_lane(from, count, factor, to);
    for (int i = count / kSteps<Pair>; i < numbers(count); ++i) {
      to[i * kPanel<T>] = In{};
    }
  }
  // Those of a tile are 0 until they are loaded.
  static void load_summand(BFloat16 const* from, int count, int row, In* panel) {
    if (row % kTileElements == 0) {
      std::memset(panel + row / kSteps<Pair> * kPanel<T>, 0, sizeof(In) * kTilePairs * kPanel<T>);
    }
    PairOperands::load_summand(from, count, row, panel);
  }
  static T at(In const* row, int i) { return PairOperands::at(row, i); }
  // Each 16 columns of 32 rows become a tile in their place.
  static Left as_weights(T* panel, int rows, int vectors) {
    for (int row = 0; row < rows; row += kTileElements) {
      for (int v = 0; v < vectors; ++v) {
        pack(panel + row * kPanel<T> + v * kWidth<T>, rows - row);
      }
    }
    return {reinterpret_cast<In const*>(panel), kPanel<T>, kTileRows, kTileElements * kPanel<T>};
  }

 private:
  static void pack(T* block, int rows) {
    __m512i pairs[kTilePairs];
#pragma GCC unroll 16
    for (int i = 0; i < kTilePairs; ++i) {
      T const* const from = block + 2 * i * kPanel<T>;
      __m512 const low = 2 * i < rows ? _mm512_load_ps(from) : _mm512_setzero_ps();
      __m512 const high = 2 * i + 1 < rows ? _mm512_load_ps(from + kPanel<T>) : _mm512_setzero_ps();
      pairs[i] = PairOperands::paired(low, high);
    }
    transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      _mm512_store_si512(block + i * kPanel<T>, pairs[i]);
    }
  }
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
