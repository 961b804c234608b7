// What floating-point instructions compute from one lane's operands. Z: whether subnormal numbers
// are taken for zero (.ftz).
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "values.h"

namespace emulator::floats {

template <bool kFlush>
float z(float x) {
  return kFlush ? flush(x) : x;
}

inline float canonical_nan() { return read<float>(0x7fffffff); }

template <bool kNan, bool kLarger>
float extreme(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) {
    if (kNan || (std::isnan(a) && std::isnan(b))) {
      return canonical_nan();
    }
    return std::isnan(a) ? b : a;
  }
  if (a == 0 && b == 0) {
    return std::signbit(a) == kLarger ? b : a;
  }
  return (a < b) == kLarger ? b : a;
}

template <bool Z>
struct AddF {
  static float run(float a, float b) { return z<Z>(z<Z>(a) + z<Z>(b)); }
};
template <bool Z>
struct SubF {
  static float run(float a, float b) { return z<Z>(z<Z>(a) - z<Z>(b)); }
};
template <bool Z>
struct MulF {
  static float run(float a, float b) { return z<Z>(z<Z>(a) * z<Z>(b)); }
};
template <bool Z>
struct FmaF {
  static float run(float a, float b, float c) { return z<Z>(std::fma(z<Z>(a), z<Z>(b), z<Z>(c))); }
};
template <bool Z>
struct DivF {
  static float run(float a, float b) { return z<Z>(z<Z>(a) / z<Z>(b)); }
};
template <bool Z>
struct RcpF {
  static float run(float a) { return z<Z>(1.f / z<Z>(a)); }
};
template <bool Z>
struct SqrtF {
  static float run(float a) { return z<Z>(std::sqrt(z<Z>(a))); }
};
template <bool Z>
struct RsqrtF {
  static float run(float a) { return z<Z>(1.f / std::sqrt(z<Z>(a))); }
};
template <bool Z>
struct Ex2F {
  static float run(float a) { return z<Z>(std::exp2(z<Z>(a))); }
};
template <bool Z>
struct Lg2F {
  static float run(float a) { return z<Z>(std::log2(z<Z>(a))); }
};
template <bool Z>
struct SinF {
  static float run(float a) { return z<Z>(std::sin(z<Z>(a))); }
};
template <bool Z>
struct CosF {
  static float run(float a) { return z<Z>(std::cos(z<Z>(a))); }
};
template <bool Z>
struct NegF {
  static float run(float a) { return -z<Z>(a); }
};
template <bool Z>
struct AbsF {
  static float run(float a) { return std::fabs(z<Z>(a)); }
};
template <bool Z, bool N>
struct MinF {
  static float run(float a, float b) { return extreme<N, false>(z<Z>(a), z<Z>(b)); }
};
template <bool Z, bool N>
struct MaxF {
  static float run(float a, float b) { return extreme<N, true>(z<Z>(a), z<Z>(b)); }
};
struct TanhF {
  static float run(float a) { return std::tanh(a); }
};
// With the largest error that PTX allows, 2^-11 of the result, of either sign.
struct TanhApproxF {
  static float run(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    float const sign = (bits * 2654435761u) >> 31 ? 1.f : -1.f;
    float const y = std::tanh(a) * (1 + sign * 0x1p-11f);
    return y > 1 ? 1.f : y < -1 ? -1.f : y;  // NaN stays
  }
};
struct CopySignF {
  static float run(float a, float b) { return std::copysign(b, a); }
};
inline float saturated(float x) { return x >= 0.f ? std::min(x, 1.f) : 0.f; }  // NaN: 0
template <class F>
struct Saturated2 {
  static float run(float a, float b) { return saturated(F::run(a, b)); }
};
template <class F>
struct Saturated3 {
  static float run(float a, float b, float c) { return saturated(F::run(a, b, c)); }
};

// With the rounding mode set; volatile keeps the compiler from moving the operations.
template <int kMode, class Op>
float rounded(Op op) {
  int const before = std::fegetround();
  std::fesetround(kMode);
  float volatile const result = op();
  std::fesetround(before);
  return result;
}
template <int kMode>
struct FmaRounded {
  static float run(float a, float b, float c) {
    float volatile x = a, y = b, w = c;
    return rounded<kMode>([&] { return std::fma(float(x), float(y), float(w)); });
  }
};
template <int kMode>
struct AddRounded {
  static float run(float a, float b) {
    float volatile x = a, y = b;
    return rounded<kMode>([&] { return x + y; });
  }
};
template <int kMode>
struct MulRounded {
  static float run(float a, float b) {
    float volatile x = a, y = b;
    return rounded<kMode>([&] { return x * y; });
  }
};

template <class T>
T round_to(float x);
template <>
inline Half round_to<Half>(float x) {
  return to_half(x);
}
template <>
inline BFloat round_to<BFloat>(float x) {
  return to_bfloat(x);
}
// F over floats, rounded to 16 bits; sums and products of two such numbers are rounded once, since
// a float holds them with enough bits.
template <class F, class T>
struct Narrow1 {
  static T run(T a) { return round_to<T>(F::run(to_float(a))); }
};
template <class F, class T>
struct Narrow2 {
  static T run(T a, T b) { return round_to<T>(F::run(to_float(a), to_float(b))); }
};
template <class F, class T>
struct Narrow3 {
  static T run(T a, T b, T c) { return round_to<T>(F::run(to_float(a), to_float(b), to_float(c))); }
};
template <class F, class T>
struct Pair1 {
  static Pair<T> run(Pair<T> a) { return {F::run(a.low), F::run(a.high)}; }
};
template <class F, class T>
struct Pair2 {
  static Pair<T> run(Pair<T> a, Pair<T> b) {
    return {F::run(a.low, b.low), F::run(a.high, b.high)};
  }
};
template <class F, class T>
struct Pair3 {
  static Pair<T> run(Pair<T> a, Pair<T> b, Pair<T> c) {
    return {F::run(a.low, b.low, c.low), F::run(a.high, b.high, c.high)};
  }
};

struct AddD {
  static double run(double a, double b) { return a + b; }
};
struct SubD {
  static double run(double a, double b) { return a - b; }
};
struct MulD {
  static double run(double a, double b) { return a * b; }
};
struct DivD {
  static double run(double a, double b) { return a / b; }
};
struct FmaD {
  static double run(double a, double b, double c) { return std::fma(a, b, c); }
};
struct NegD {
  static double run(double a) { return -a; }
};
struct AbsD {
  static double run(double a) { return std::fabs(a); }
};
struct MinD {
  static double run(double a, double b) { return std::fmin(a, b); }
};
struct MaxD {
  static double run(double a, double b) { return std::fmax(a, b); }
};
struct SqrtD {
  static double run(double a) { return std::sqrt(a); }
};
struct RcpD {
  static double run(double a) { return 1 / a; }
};

}  // namespace emulator::floats
