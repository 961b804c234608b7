// The tile registers of AMX: eight, each of 16 rows of 64 bytes. Code that multiplies takes
// TileRegisters, which are the processor's or, in builds for tests, an array.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_fmha/cpu/vector.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileRowBytes = 64;

// Strides are in bytes. The instructions are written out because the compilers' functions take
// literal numbers of registers.
struct AmxRegisters {
  // A thread has no tiles until it configures them, and its state is small again once it releases
  // them. Both are undone by each other only.
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kTileRowBytes;
      shape.rows[tile] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  static void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(void const* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // Number (i, j) of kSum += the products of pairs (i, k) of kA and pairs (k, j) of kB.
  template <int kSum, int kA, int kB>
  static void add_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

// The same results in C++, as the Intel 64 and IA-32 Architectures Software Developer's Manual
// defines TDPBF16PS: products of the first and of the second of each pair have sums of their own,
// which are added to the tile at the end; subnormal numbers are 0.
struct EmulatedRegisters {
  static void configure() { std::memset(tiles(), 0, 8 * sizeof(Tile)); }
  static void release() { std::memset(tiles(), 0xff, 8 * sizeof(Tile)); }

  template <int kTile>
  static void zero() {
    std::memset(&tiles()[kTile], 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(void const* from, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(tiles()[kTile].numbers[row], static_cast<char const*>(from) + row * stride,
                  kTileRowBytes);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<char*>(to) + row * stride, tiles()[kTile].numbers[row],
                  kTileRowBytes);
    }
  }
  template <int kSum, int kA, int kB>
  static void add_products() {
    for (int i = 0; i < kTileRows; ++i) {
      float first[kColumns] = {}, second[kColumns] = {};
      for (int k = 0; k < kColumns; ++k) {
        uint32_t const a = tiles()[kA].numbers[i][k];
        for (int j = 0; j < kColumns; ++j) {
          uint32_t const b = tiles()[kB].numbers[k][j];
          first[j] = flushed(first[j] + flushed(number(a << 16) * number(b << 16)));
          second[j] = flushed(second[j] + flushed(number(a >> 16 << 16) * number(b >> 16 << 16)));
        }
      }
      for (int j = 0; j < kColumns; ++j) {
        float const sum = number(tiles()[kSum].numbers[i][j]);
        float const found = flushed(sum + flushed(first[j] + second[j]));
        std::memcpy(&tiles()[kSum].numbers[i][j], &found, sizeof found);
      }
    }
  }

 private:
  static constexpr int kColumns = kTileRowBytes / sizeof(uint32_t);
  struct Tile {
    uint32_t numbers[kTileRows][kColumns];
  };
  static Tile* tiles() {
    static thread_local Tile all[8];
    return all;
  }
  static float flushed(float x) {
    return x < __FLT_MIN__ && x > -__FLT_MIN__ ? __builtin_copysignf(0, x) : x;
  }
  static float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flushed(x);
  }
};

using TileRegisters = SPARSE_FMHA_TILE_REGISTERS;

// While it exists, its thread has tiles.
class TilesInUse {
 public:
  TilesInUse() { TileRegisters::configure(); }
  ~TilesInUse() { TileRegisters::release(); }
  TilesInUse(TilesInUse const&) = delete;
  TilesInUse& operator=(TilesInUse const&) = delete;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
