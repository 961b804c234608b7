// Vectors as wide as the instruction set of this translation unit, and the vector functions that
// softmax needs. All of it is in a namespace named after the instruction set: this header is
// compiled once per set, and the linker must not merge the results.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SPARSE_FMHA_ISA
#error "SPARSE_FMHA_ISA names the instruction set's namespace"
#endif

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// kPanelVectors * kPanelRows accumulators and a row of operands fit in the register file.
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kPanelVectors = 4;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kPanelVectors = 2;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kPanelVectors = 2;
#endif
#if defined(SPARSE_FMHA_TILE_REGISTERS)
inline constexpr int kPanelRows = 32;  // of two tiles
#else
inline constexpr int kPanelRows = 4;
#endif

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline constexpr int kWidth = kVectorBytes / sizeof(T);

// Columns of a panel: what one pass of the inner product keeps in registers.
template <class T>
inline constexpr int kPanel = kPanelVectors * kWidth<T>;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// Calls body with the number of vectors as a compile-time constant.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int n = 1, class Body>
inline void with_vectors(int vectors, Body body) {
  if constexpr (n < kPanelVectors) {
    if (vectors > n) {
      return with_vectors<n + 1>(vectors, body);
    }
  }
  body(Count<n>{});
}

template <class V>
inline V max(V x, V y) {
  return y > x ? y : x;
}

template <class T>
struct Exp2;

// 2^f on [-1/2, 1/2], minimax in the relative error: 2e-9 and 3e-18.
template <>
struct Exp2<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kLowest = -126;
  static constexpr float kRound =
      0x1.8p23f + 127;  // adding it leaves round(x) + bias in the low bits
  static constexpr float kCoefficients[] = {1.0f,
                                            0.693147205737f,
                                            0.240226468906f,
                                            0.0555032877711f,
                                            0.00961848895634f,
                                            0.00133999311772f,
                                            0.000153458121613f};
};

template <>
struct Exp2<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kLowest = -1022;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kCoefficients[] = {1.0,
                                             0.69314718055994533,
                                             0.240226506959101562,
                                             0.0555041086648199216,
                                             0.00961812910758833524,
                                             0.00133335581467899217,
                                             0.000154035304625144321,
                                             1.52527334899885256e-5,
                                             1.32154330896763992e-6,
                                             1.01781980216719308e-7,
                                             7.0741056135081428e-9,
                                             4.43528270695727715e-10};
};

// 2^x for x <= 0; 0 below the normal numbers and for -inf.
template <class T>
inline Vector<T> exp2(Vector<T> x) {
  using C = Exp2<T>;
  Vector<T> const bounded = x < C::kLowest ? broadcast(C::kLowest) : x;
  Vector<T> const shifted = bounded + C::kRound;
  Vector<T> const fraction = bounded - (shifted - C::kRound);
  constexpr int kDegree = sizeof(C::kCoefficients) / sizeof(T) - 1;
  Vector<T> power = broadcast(C::kCoefficients[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) {
    power = power * fraction + C::kCoefficients[i];
  }
  auto const exponent = reinterpret_cast<typename VectorOf<T>::bits>(shifted) << C::kMantissaBits;
  power *= reinterpret_cast<Vector<T>>(exponent);
  return x < C::kLowest ? Vector<T>{} : power;
}

// To about two units in the last place, by exponentials: near 0 these cancel, and the Taylor series
// takes over.
inline Vector<float> tanh(Vector<float> x) {
  using V = Vector<float>;
  constexpr float kNearZero = 0.25f;
  constexpr float kTwoLog2e = 2.88539008177792681472f;
  V const magnitude = x < 0.f ? -x : x;
  V const e = exp2<float>(magnitude * -kTwoLog2e);
  V const far = (1.f - e) / (1.f + e);
  V const square = x * x;
  constexpr float kSeries[] = {62.f / 2835, -17.f / 315, 2.f / 15, -1.f / 3, 1.f};
  V series{};
  for (float const coefficient : kSeries) {
    series = series * square + coefficient;
  }
  return magnitude < kNearZero ? x * series : x < 0.f ? -far : far;
}

// fp64 is what others are checked with.
inline Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) {
    x[i] = __builtin_tanh(x[i]);
  }
  return x;
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
