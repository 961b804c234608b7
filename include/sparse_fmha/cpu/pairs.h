// Operands as pairs of bf16, which one instruction multiplies and adds in fp32.
#pragma once

#include <immintrin.h>

#include "sparse_fmha/cpu/operands.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Two steps of a sum, the first one in the low half.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};
template <>
inline constexpr int kSteps<Pair> = 2;

// Flushes subnormal numbers to 0, as the instruction does.
inline Vector<float> add_product(Vector<float> sum, Pair x, Pair const* row) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(row),
                          (__m512bh)_mm512_set1_epi32(static_cast<int>(x.bits)));
}

struct PairOperands {
  using T = float;
  using In = Pair;
  using Left = Factor<In>;

  static constexpr int numbers(int dim) { return dim / kSteps<In>; }
  static Left rows(In const* data, int numbers) { return {data, numbers, 1}; }

  static void load_row(BFloat16 const* from, int count, In* to) {
    std::memcpy(to, from, count * sizeof(BFloat16));
  }
  static void load_lane(BFloat16 const* from, int count, T factor, In* to) {
    if (factor != T(1) && factor != T(-1)) {
      load_scaled_lane(from, count, factor, to);
      return;
    }
    uint32_t const sign = factor < 0 ? 0x80008000u : 0u;
    for (int i = 0; i < count; i += 2) {
      to[i / 2 * kPanel<T>].bits =
          (from[i].bits | static_cast<uint32_t>(from[i + 1].bits) << 16) ^ sign;
    }
  }
  static void load_summand(BFloat16 const* __restrict from, int count, int row,
                           In* __restrict panel) {
    In* const to = panel + row / 2 * kPanel<T>;
    if (row % 2 == 0) {
      for (int i = 0; i < count; ++i) {
        to[i].bits = from[i].bits;
      }
    } else {
      for (int i = 0; i < count; ++i) {
        to[i].bits |= static_cast<uint32_t>(from[i].bits) << 16;
      }
    }
  }
  __attribute__((noinline)) static void load_scaled_lane(BFloat16 const* from, int count, T factor,
                                                         In* to) {
    for (int i = 0; i < count; i += 2) {
      BFloat16 low, high;
      narrow(widen(from[i]) * factor, &low);
      narrow(widen(from[i + 1]) * factor, &high);
      to[i / 2 * kPanel<T>].bits = low.bits | static_cast<uint32_t>(high.bits) << 16;
    }
  }
  static T at(In const* row, int i) {
    return from_bits(i % 2 == 0 ? row[i / 2].bits << 16 : row[i / 2].bits & 0xffff0000u);
  }
  static Left as_weights(T* panel, int rows, int vectors) {
    for (int row = 0; row < rows; row += 2) {
      T const* const from = panel + row * kPanel<T>;
      T* const to = panel + row / 2 * kPanel<T>;
      for (int v = 0; v < vectors * kWidth<T>; v += kWidth<T>) {
        __m512 const low = _mm512_load_ps(from + v);
        __m512 const high =
            row + 1 < rows ? _mm512_load_ps(from + kPanel<T> + v) : _mm512_setzero_ps();
        _mm512_store_si512(to + v, paired(low, high));
      }
    }
    return {reinterpret_cast<In const*>(panel), 1, kPanel<T>};
  }
  // The pair of each lane.
  static __m512i paired(__m512 low, __m512 high) {
    alignas(64) static constexpr uint16_t kPlaces[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    auto const both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), both);
  }
};

#if !defined(SPARSE_FMHA_TILE_REGISTERS)
template <>
struct Operands<BFloat16> : PairOperands {};
#endif

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
