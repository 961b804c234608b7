// What integer and bit instructions compute from one lane's operands.
#pragma once

#include <algorithm>

#include "values.h"

namespace emulator::integers {

template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using Type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using Type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using Type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using Type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using Type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using Type = __int128;
};
template <class T>
using wider = typename Wider<T>::Type;
template <class T>
using bits_of = std::make_unsigned_t<T>;
template <class T>
constexpr int kBits = 8 * sizeof(T);

// Overflow wraps: computed without sign.
template <class T>
T add(T a, T b) {
  return static_cast<T>(bits_of<T>(a) + bits_of<T>(b));
}
template <class T>
T product(T a, T b) {
  return static_cast<T>(static_cast<wider<bits_of<T>>>(bits_of<T>(a)) * bits_of<T>(b));
}
template <class T>
wider<T> wide(T a, T b) {
  return static_cast<wider<T>>(a) * b;
}

template <class T>
struct Add {
  static T run(T a, T b) { return add(a, b); }
};
template <class T>
struct Sub {
  static T run(T a, T b) { return static_cast<T>(bits_of<T>(a) - bits_of<T>(b)); }
};
template <class T>
struct MulLo {
  static T run(T a, T b) { return product(a, b); }
};
template <class T>
struct MulHi {
  static T run(T a, T b) { return static_cast<T>(wide(a, b) >> kBits<T>); }
};
template <class T>
struct MulWide {
  static wider<T> run(T a, T b) { return wide(a, b); }
};
template <class T>
struct MadLo {
  static T run(T a, T b, T c) { return add(product(a, b), c); }
};
template <class T>
struct MadHi {
  static T run(T a, T b, T c) { return add(static_cast<T>(wide(a, b) >> kBits<T>), c); }
};
template <class T>
struct MadWide {
  static wider<T> run(T a, T b, wider<T> c) {
    using Bits = bits_of<wider<T>>;
    return static_cast<wider<T>>(static_cast<Bits>(wide(a, b)) + static_cast<Bits>(c));
  }
};
template <class T>
struct Div {
  static T run(T a, T b) {
    if (b == 0) {
      return static_cast<T>(~T{0});
    }
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? Sub<T>::run(0, a) : T(a / b);
  }
};
template <class T>
struct Rem {
  static T run(T a, T b) {
    if (b == 0) {
      return a;
    }
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : T(a % b);
  }
};
template <class T>
struct Min {
  static T run(T a, T b) { return b < a ? b : a; }
};
template <class T>
struct Max {
  static T run(T a, T b) { return a < b ? b : a; }
};
template <class T>
struct Neg {
  static T run(T a) { return Sub<T>::run(0, a); }
};
template <class T>
struct Abs {
  static T run(T a) { return a < 0 ? Sub<T>::run(0, a) : a; }
};
template <class T>
struct And {
  static T run(T a, T b) { return a & b; }
};
template <class T>
struct Or {
  static T run(T a, T b) { return a | b; }
};
template <class T>
struct Xor {
  static T run(T a, T b) { return a ^ b; }
};
template <class T>
struct Not {
  static T run(T a) { return static_cast<T>(~uint64_t{a}); }
};
template <>
struct Not<bool> {
  static bool run(bool a) { return !a; }
};
template <class T>
struct Shl {
  static T run(T a, uint32_t n) { return n < kBits<T> ? T(a << n) : T{0}; }
};
template <class T>
struct Shr {
  static T run(T a, uint32_t n) { return n < kBits<T> ? T(a >> n) : T(a < 0 ? T(-1) : T(0)); }
};
template <class T>
struct Popc {
  static uint32_t run(T a) { return __builtin_popcountll(a); }
};
template <class T>
struct Clz {
  static uint32_t run(T a) { return a == 0 ? kBits<T> : __builtin_clzll(a) - (64 - kBits<T>); }
};
template <class T>
struct Brev {
  static T run(T a) {
    T result = 0;
    for (int i = 0; i < kBits<T>; ++i) {
      result |= ((a >> i) & 1) << (kBits<T> - 1 - i);
    }
    return result;
  }
};
// The place of the highest bit that differs from the sign; all ones if there is none.
template <class T>
struct Bfind {
  static uint32_t run(T a) {
    auto const bits = static_cast<bits_of<T>>(a < 0 ? T(~a) : a);
    return bits == 0 ? ~0u : 63u - __builtin_clzll(bits);
  }
};
template <class T>
struct BfindShift {
  static uint32_t run(T a) {
    uint32_t const place = Bfind<T>::run(a);
    return place == ~0u ? place : kBits<T> - 1 - place;
  }
};
template <class T>
struct Bfe {
  static T run(T a, uint32_t start, uint32_t length) {
    uint32_t const first = start & 255, count = length & 255;
    if (count == 0) {
      return 0;
    }
    bool const sign =
        std::is_signed_v<T> && ((a >> std::min<uint32_t>(first + count - 1, kBits<T> - 1)) & 1);
    bits_of<T> result = 0;
    for (uint32_t i = 0; i < kBits<T>; ++i) {
      bool const bit = i < count && first + i < kBits<T> ? (a >> (first + i)) & 1 : sign;
      result |= bits_of<T>(bit) << i;
    }
    return static_cast<T>(result);
  }
};
template <class T>
struct Bfi {
  static T run(T a, T b, uint32_t start, uint32_t length) {
    uint32_t const first = start & 255, count = length & 255;
    if (first >= kBits<T> || count == 0) {
      return b;
    }
    T const mask = (count >= kBits<T> ? ~T{0} : (T{1} << count) - 1) << first;
    return (b & ~mask) | ((a << first) & mask);
  }
};
struct Lop3 {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      if ((table >> i) & 1) {
        result |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
      }
    }
    return result;
  }
};
struct Prmt {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t const bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      uint32_t const select = selector >> (4 * i) & 15;
      auto byte = static_cast<uint8_t>(bytes >> (8 * (select & 7)));
      if (select & 8) {
        byte = byte & 0x80 ? 0xff : 0;
      }
      result |= uint32_t{byte} << (8 * i);
    }
    return result;
  }
};
template <bool kLeft, bool kWraps>
struct Funnel {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t count) {
    uint32_t const n = kWraps ? count & 31 : std::min(count, 32u);
    uint64_t const both = uint64_t{b} << 32 | a;
    return static_cast<uint32_t>(kLeft ? both << n >> 32 : both >> n);
  }
};
template <class A, class B>
struct Dot4 {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i) {
      c += static_cast<uint32_t>(static_cast<A>(a >> (8 * i)) * static_cast<B>(b >> (8 * i)));
    }
    return c;
  }
};

}  // namespace emulator::integers
