// Numbers of 16 bits from and to float.
#include "values.h"

namespace emulator {

float to_float(Half x) {
  uint32_t const sign = uint32_t{x.bits & 0x8000u} << 16;
  uint32_t const exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float result;
  if (exponent == 0) {
    result = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -result : result;
  }
  uint32_t const bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&result, &bits, 4);
  return result;
}

Half to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  auto const sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  float const size = std::fabs(x);
  if (std::isnan(x)) {
    return {0x7fff};
  }
  if (size >= 65520.f) {
    return {static_cast<uint16_t>(sign | 0x7c00)};
  }
  if (size < 0x1p-14f) {  // steps of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
  }
  bits &= 0x7fffffffu;
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)))};
}

BFloat to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) {
    return {0x7fff};
  }
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace emulator
