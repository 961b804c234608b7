// Values of PTX types in the 64 bits of a lane's register, and handlers made of plain functions.
#pragma once

#include <cmath>
#include <cstring>

#include "warp.h"

namespace emulator {

template <class T>
inline T read(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <>
inline bool read<bool>(uint64_t bits) {
  return (bits & 1) != 0;
}
template <class T>
inline uint64_t write(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(value);
  } else {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
  }
}

// F::run(A...) for each lane: the result to the first register, the arguments from the next ones.
template <class F, class D, class... A>
struct PerLane {
  static Outcome run(Warp& warp, Instruction const& i, uint32_t lanes) {
    return over(warp, i, lanes, std::index_sequence_for<A...>{});
  }
  template <size_t... K>
  static Outcome over(Warp& warp, Instruction const& i, uint32_t lanes, std::index_sequence<K...>) {
    uint64_t* const d = warp.reg(i.at[0]);
    uint64_t const* const s[] = {warp.reg(i.at[K + 1])...};
    if (lanes == kAllLanes) {
      uint64_t results[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        results[lane] = write<D>(F::run(read<A>(s[K][lane])...));
      }
      std::memcpy(d, results, sizeof results);
    } else {
      each_lane(lanes, [&](int lane) { d[lane] = write<D>(F::run(read<A>(s[K][lane])...)); });
    }
    return Outcome::kNext;
  }
};

// 16-bit floats.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
template <class T>
struct Pair {
  T low, high;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) {
  uint32_t const bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
float to_float(Half x);
Half to_half(float x);      // to nearest, ties to even
BFloat to_bfloat(float x);  // to nearest, ties to even

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace emulator
