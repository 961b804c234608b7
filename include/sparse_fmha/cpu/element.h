// Conversion of rows of 16-bit elements to and from the compute type. By integer arithmetic,
// because not every compiler and CPU has the conversions.
#pragma once

#include "sparse_fmha/cpu/vector.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  // The exponent keeps half's bias until the multiplication corrects it, also for subnormals.
  uint32_t const magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t const scaled = to_bits(from_bits(magnitude) * 0x1p112f);
  uint32_t const special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return from_bits(scaled | special | (x.bits & 0x8000u) << 16);
}

// `count` is a head dim or a panel of one, so a multiple of the step.
template <class Element, class T>
inline void widen_row(Element const* __restrict from, int count, T* __restrict to) {
  constexpr int kStep = kPanel<T> < 8 ? kPanel<T> : 8;
  for (int i = 0; i < count; i += kStep) {
    for (int j = 0; j < kStep; ++j) {
      to[i + j] = widen(from[i + j]);
    }
  }
}

// Rounds to nearest even.
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  uint32_t const bits = to_bits(x);
  uint32_t const rounded = bits + 0x7fff + (bits >> 16 & 1);
  to->bits = static_cast<uint16_t>(x == x ? rounded >> 16 : 0x7fc0);
}
inline void narrow(float x, Half* to) {
  uint32_t const bits = to_bits(x);
  uint32_t const magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and up, inf, NaN
    half = x == x ? 0x7c00 : 0x7e00;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// The type in which an element is computed.
template <class Element>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
