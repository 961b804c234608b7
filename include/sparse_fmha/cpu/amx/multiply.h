// Matrix products in tile registers: two by two tiles of sums, with two of each operand.
#pragma once

#include "sparse_fmha/cpu/amx/operands.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Sums of 32 rows and 16 * kColumns columns, in registers 0 to 3.
template <int kColumns>
class TileSums {
  static constexpr int64_t kStride = kPanel<float> * sizeof(float);  // of panels, in bytes

 public:
  // a has `steps` tiles along the sum, b as many of them, below each other in a panel.
  static void add_up(LeftTiles a, Pair const* b, int steps) {
    zero();
    int64_t const stride = a.row_stride * static_cast<int64_t>(sizeof(Pair));
    for (int step = 0; step < steps; ++step) {
      R::load<6>(b, kStride);
      R::load<4>(a.data, stride);
      R::add_products<0, 4, 6>();
      R::load<5>(a.data + a.tile_stride, stride);
      R::add_products<1, 5, 6>();
      if constexpr (kColumns == 2) {
        R::load<7>(b + kTilePairs, kStride);
        R::add_products<2, 4, 7>();
        R::add_products<3, 5, 7>();
      }
      a.data += a.step_stride;
      b += kTilePairs * kPanel<float>;
    }
  }
  // c_stride: in numbers.
  static void store(float* c, int64_t c_stride) {
    int64_t const stride = c_stride * static_cast<int64_t>(sizeof(float));
    float* const below = c + kTileRows * c_stride;
    R::store<0>(c, stride);
    R::store<1>(below, stride);
    if constexpr (kColumns == 2) {
      R::store<2>(c + kTilePairs, stride);
      R::store<3>(below + kTilePairs, stride);
    }
  }

 private:
  using R = TileRegisters;

  static void zero() {
    R::zero<0>();
    R::zero<1>();
    if constexpr (kColumns == 2) {
      R::zero<2>();
      R::zero<3>();
    }
  }
};

// Sums that are stored, but not added yet: that is done beside the next products.
class StoredSums {
  static constexpr int kColumns = 2;
  static constexpr int kRowLength = kColumns * kTilePairs;
  using V = Vector<float>;

 public:
  StoredSums(int64_t c_stride, float const* keep) : c_stride_(c_stride), keep_(keep) {}

  // Notes that the sums in `next()` belong to c, from the given row on.
  void put(float* c, int row, int columns) {
    c_ = c;
    row_ = row;
    columns_ = columns;
    turn_ ^= 1;
  }
  float* next() { return sums_[turn_]; }
  static constexpr int64_t stride() { return kRowLength; }

  // c = keep * c + sums.
  void add() const {
    if (columns_ == 2) {
      add_columns<2>();
    } else if (columns_ == 1) {
      add_columns<1>();
    }
  }

 private:
  template <int kVectors>
  void add_columns() const {
    float const* from = sums_[turn_ ^ 1];
    for (int r = 0; r < kPanelRows; ++r) {
      V* const to = reinterpret_cast<V*>(c_ + r * c_stride_);
      float const kept = keep_ == nullptr ? 1.f : keep_[row_ + r];
      for (int v = 0; v < kVectors; ++v) {
        to[v] = kept * to[v] + reinterpret_cast<V const*>(from)[v];
      }
      from += kRowLength;
    }
  }

  int64_t const c_stride_;
  float const* const keep_;
  float* c_ = nullptr;
  int row_ = 0;
  int columns_ = 0;  // none yet
  int turn_ = 0;
  alignas(64) float sums_[2][kPanelRows * kRowLength];
};

// Calls body(columns, row, vector) for every block of a product, `columns` at compile time.
template <class Body>
inline void for_each_tile_block(int rows, int vectors, Body body) {
  static_assert(kPanelRows == 2 * kTileRows, "two tiles of rows");
  for (int row = 0; row < rows; row += kPanelRows) {
    int v = 0;
    for (; v + 2 <= vectors; v += 2) {
      body(Count<2>{}, row, v);
    }
    if (v < vectors) {
      body(Count<1>{}, row, v);
    }
  }
}

// c = keep * c + a * b, or without kAccumulate c = a * b; for the arguments see cpu/multiply.h.
// Numbers behind `steps` are 0 up to whole tiles.
template <bool kAccumulate>
inline void multiply(LeftTiles a, int rows, Pair const* b, int vectors, int steps, float* c,
                     int64_t c_stride, float const* keep = nullptr) {
  int const tiles = Operands<BFloat16>::numbers(steps) / kTilePairs;
  auto const rows_of_a = [&](int row) {
    return LeftTiles{a.data + row / kTileRows * a.tile_stride, a.row_stride, a.tile_stride,
                     a.step_stride};
  };
  if constexpr (kAccumulate) {
    StoredSums stored(c_stride, keep);
    for_each_tile_block(rows, vectors, [&](auto columns, int row, int v) {
      using Sums = TileSums<columns.value>;
      Sums::add_up(rows_of_a(row), b + v * kWidth<float>, tiles);
      stored.add();
      Sums::store(stored.next(), stored.stride());
      stored.put(c + row * c_stride + v * kWidth<float>, row, columns.value);
    });
    stored.add();
  } else {
    for_each_tile_block(rows, vectors, [&](auto columns, int row, int v) {
      using Sums = TileSums<columns.value>;
      Sums::add_up(rows_of_a(row), b + v * kWidth<float>, tiles);
      Sums::store(c + row * c_stride + v * kWidth<float>, c_stride);
    });
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
