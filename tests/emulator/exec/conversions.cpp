// cvt.
#include <limits>

#include "decoder.h"
#include "values.h"

namespace emulator {
namespace {

enum class Round : uint64_t { kNearest, kZero, kDown, kUp };

double to_integral(double x, Round round) {
  switch (round) {
    case Round::kNearest:
      return std::nearbyint(x);
    case Round::kZero:
      return std::trunc(x);
    case Round::kDown:
      return std::floor(x);
    case Round::kUp:
      return std::ceil(x);
  }
  return x;
}

template <class T>
constexpr bool kIsFloat = !std::is_integral_v<T>;

template <class T>
double as_double(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class D>
D from_float(double x) {
  if constexpr (std::is_same_v<D, Half>) {
    return to_half(static_cast<float>(x));
  }
  if constexpr (std::is_same_v<D, BFloat>) {
    return to_bfloat(static_cast<float>(x));
  }
  if constexpr (std::is_floating_point_v<D>) {
    return static_cast<D>(x);
  }
}

// `value` is the rounding mode; count: whether the result is saturated.
template <class D, class S>
Outcome convert(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint64_t* const to = warp.reg(i.at[0]);
  uint64_t const* const from = warp.reg(i.at[1]);
  auto const round = static_cast<Round>(i.value);
  each_lane(lanes, [&](int lane) {
    S const x = read<S>(from[lane]);
    D result{};
    if constexpr (!kIsFloat<S> && !kIsFloat<D>) {
      if (i.count != 0) {
        __int128 const low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
        result = static_cast<D>(std::min(std::max<__int128>(x, low), high));
      } else {
        result = static_cast<D>(x);
      }
    } else if constexpr (!kIsFloat<S>) {
      if constexpr (std::is_floating_point_v<D>) {
        result = static_cast<D>(x);
      } else {
        result = from_float<D>(static_cast<float>(x));
      }
    } else if constexpr (!kIsFloat<D>) {
      double const whole = to_integral(as_double(x), round);
      if (std::isnan(whole)) {
        result = 0;
      } else if (whole <= static_cast<double>(std::numeric_limits<D>::min())) {
        result = std::numeric_limits<D>::min();
      } else if (whole >= static_cast<double>(std::numeric_limits<D>::max())) {
        result = std::numeric_limits<D>::max();
      } else {
        result = static_cast<D>(whole);
      }
    } else {
      double value = as_double(x);
      if (i.bytes != 0) {  // cvt.rni.f32.f32
        value = to_integral(value, round);
      }
      if (i.count != 0) {
        value = value >= 0 ? std::min(value, 1.0) : 0.0;
      }
      result = from_float<D>(value);
    }
    to[lane] = write<D>(result);
  });
  return Outcome::kNext;
}

template <class D>
Handler from(std::string const& type) {
  if (type == "u8" || type == "b8") {
    return convert<D, uint8_t>;
  }
  if (type == "s8") {
    return convert<D, int8_t>;
  }
  if (type == "u16") {
    return convert<D, uint16_t>;
  }
  if (type == "s16") {
    return convert<D, int16_t>;
  }
  if (type == "u32") {
    return convert<D, uint32_t>;
  }
  if (type == "s32") {
    return convert<D, int32_t>;
  }
  if (type == "u64") {
    return convert<D, uint64_t>;
  }
  if (type == "s64") {
    return convert<D, int64_t>;
  }
  if (type == "f16") {
    return convert<D, Half>;
  }
  if (type == "bf16") {
    return convert<D, BFloat>;
  }
  if (type == "f32") {
    return convert<D, float>;
  }
  if (type == "f64") {
    return convert<D, double>;
  }
  return nullptr;
}

Handler conversion(std::string const& to, std::string const& type) {
  if (to == "u8") {
    return from<uint8_t>(type);
  }
  if (to == "s8") {
    return from<int8_t>(type);
  }
  if (to == "u16") {
    return from<uint16_t>(type);
  }
  if (to == "s16") {
    return from<int16_t>(type);
  }
  if (to == "u32") {
    return from<uint32_t>(type);
  }
  if (to == "s32") {
    return from<int32_t>(type);
  }
  if (to == "u64") {
    return from<uint64_t>(type);
  }
  if (to == "s64") {
    return from<int64_t>(type);
  }
  if (to == "f16") {
    return from<Half>(type);
  }
  if (to == "bf16") {
    return from<BFloat>(type);
  }
  if (to == "f32") {
    return from<float>(type);
  }
  if (to == "f64") {
    return from<double>(type);
  }
  return nullptr;
}

// cvt.rn.f16x2.f32 d, high, low
template <class T>
struct Pack {
  static Pair<T> run(float high, float low) { return {narrow(low), narrow(high)}; }
  static T narrow(float x) {
    if constexpr (std::is_same_v<T, Half>) {
      return to_half(x);
    } else {
      return to_bfloat(x);
    }
  }
};

bool decode_conversion(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const modifiers = join(statement.opcode, 1);
  if (modifiers == "rn.f16x2.f32") {
    i.run = PerLane<Pack<Half>, Pair<Half>, float, float>::run;
  } else if (modifiers == "rn.bf16x2.f32") {
    i.run = PerLane<Pack<BFloat>, Pair<BFloat>, float, float>::run;
  } else {
    size_t const parts = statement.opcode.size();
    std::string const& type = statement.opcode.at(parts - 1);
    std::string const& to = statement.opcode.at(parts - 2);
    bool const narrows = to == "f16" || to == "bf16" || (to == "f32" && type != "f32");
    for (size_t part = 1; part + 2 < parts; ++part) {
      std::string const& name = statement.opcode[part];
      if (name == "sat") {
        i.count = 1;
      } else if (name == "rn" || name == "rni") {
        i.value = static_cast<uint64_t>(Round::kNearest);
      } else if (narrows) {
        return false;  // directed rounding to a float
      } else if (name == "rz" || name == "rzi") {
        i.value = static_cast<uint64_t>(Round::kZero);
      } else if (name == "rm" || name == "rmi") {
        i.value = static_cast<uint64_t>(Round::kDown);
      } else if (name == "rp" || name == "rpi") {
        i.value = static_cast<uint64_t>(Round::kUp);
      } else {
        return false;
      }
      i.bytes |= name.size() == 3 && name != "sat";
    }
    i.run = conversion(to, type);
  }
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return i.run != nullptr;
}

}  // namespace

void add_conversions(DecodeTable& table) { table["cvt"] = decode_conversion; }

}  // namespace emulator
