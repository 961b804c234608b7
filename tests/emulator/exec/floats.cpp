// Floating-point instructions. Those named like integer ones (add, min, ...) come here first.
#include <cfenv>

#include "decoder.h"
#include "values.h"

namespace emulator {

bool decode_as_integer(Decoder& decoder, ptx::Statement const& statement, Instruction& i);

namespace {

template <bool kFlush>
float z(float x) {
  return kFlush ? flush(x) : x;
}

float canonical_nan() { return read<float>(0x7fffffff); }

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
struct CopySignF {
  static float run(float a, float b) { return std::copysign(b, a); }
};
float saturated(float x) { return x >= 0.f ? std::min(x, 1.f) : 0.f; }  // NaN: 0
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
Half round_to<Half>(float x) {
  return to_half(x);
}
template <>
BFloat round_to<BFloat>(float x) {
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

using Handlers = std::unordered_map<std::string, Handler>;
template <class F>
Handler one() {
  return PerLane<F, float, float>::run;
}
template <class F>
Handler two() {
  return PerLane<F, float, float, float>::run;
}
template <class F>
Handler three() {
  return PerLane<F, float, float, float, float>::run;
}

template <bool Z>
void add_singles(Handlers& to, std::string const& f) {
  to["add" + f] = two<AddF<Z>>();
  to["sub" + f] = two<SubF<Z>>();
  to["mul" + f] = two<MulF<Z>>();
  to["fma" + f] = to["mad" + f] = three<FmaF<Z>>();
  to["neg" + f] = one<NegF<Z>>();
  to["abs" + f] = one<AbsF<Z>>();
  to["min" + f] = two<MinF<Z, false>>();
  to["max" + f] = two<MaxF<Z, false>>();
  std::string const nan = f == ".f32" ? ".NaN.f32" : ".ftz.NaN.f32";
  to["min" + nan] = two<MinF<Z, true>>();
  to["max" + nan] = two<MaxF<Z, true>>();
  for (std::string const way : {"", ".approx", ".full"}) {
    to["div" + way + f] = two<DivF<Z>>();
    to["rcp" + way + f] = one<RcpF<Z>>();
    to["sqrt" + way + f] = one<SqrtF<Z>>();
    to["rsqrt" + way + f] = one<RsqrtF<Z>>();
  }
  to["ex2.approx" + f] = one<Ex2F<Z>>();
  to["lg2.approx" + f] = one<Lg2F<Z>>();
  to["sin.approx" + f] = one<SinF<Z>>();
  to["cos.approx" + f] = one<CosF<Z>>();
  std::string const sat = f == ".f32" ? ".sat.f32" : ".ftz.sat.f32";
  to["add" + sat] = two<Saturated2<AddF<Z>>>();
  to["mul" + sat] = two<Saturated2<MulF<Z>>>();
  to["fma" + sat] = three<Saturated3<FmaF<Z>>>();
}

template <int kMode>
void add_rounded(Handlers& to, std::string const& mode) {
  to["fma" + mode + ".f32"] = three<FmaRounded<kMode>>();
  to["add" + mode + ".f32"] = two<AddRounded<kMode>>();
  to["mul" + mode + ".f32"] = two<MulRounded<kMode>>();
}

template <class T>
void add_narrow(Handlers& to, std::string const& type) {
  auto const unary = [&](char const* name, auto f) {
    using F = decltype(f);
    to[name + ("." + type)] = PerLane<Narrow1<F, T>, T, T>::run;
    to[name + ("." + type + "x2")] = PerLane<Pair1<Narrow1<F, T>, T>, Pair<T>, Pair<T>>::run;
  };
  auto const binary = [&](char const* name, auto f) {
    using F = decltype(f);
    to[name + ("." + type)] = PerLane<Narrow2<F, T>, T, T, T>::run;
    to[name + ("." + type + "x2")] =
        PerLane<Pair2<Narrow2<F, T>, T>, Pair<T>, Pair<T>, Pair<T>>::run;
  };
  unary("neg", NegF<false>{});
  unary("abs", AbsF<false>{});
  unary("ex2.approx", Ex2F<false>{});
  unary("tanh.approx", TanhF{});
  binary("add", AddF<false>{});
  binary("sub", SubF<false>{});
  binary("mul", MulF<false>{});
  binary("min", MinF<false, false>{});
  binary("max", MaxF<false, false>{});
  binary("min.NaN", MinF<false, true>{});
  binary("max.NaN", MaxF<false, true>{});
  using Fma = Narrow3<FmaF<false>, T>;
  to["fma." + type] = PerLane<Fma, T, T, T, T>::run;
  to["fma." + type + "x2"] = PerLane<Pair3<Fma, T>, Pair<T>, Pair<T>, Pair<T>, Pair<T>>::run;
}

Handlers const& handlers() {
  static Handlers const all = [] {
    Handlers to;
    add_singles<false>(to, ".f32");
    add_singles<true>(to, ".ftz.f32");
    add_rounded<FE_DOWNWARD>(to, ".rm");
    add_rounded<FE_UPWARD>(to, ".rp");
    add_rounded<FE_TOWARDZERO>(to, ".rz");
    add_narrow<Half>(to, "f16");
    add_narrow<BFloat>(to, "bf16");
    to["tanh.approx.f32"] = one<TanhF>();
    to["copysign.f32"] = two<CopySignF>();
    to["add.f64"] = PerLane<AddD, double, double, double>::run;
    to["sub.f64"] = PerLane<SubD, double, double, double>::run;
    to["mul.f64"] = PerLane<MulD, double, double, double>::run;
    to["div.f64"] = PerLane<DivD, double, double, double>::run;
    to["min.f64"] = PerLane<MinD, double, double, double>::run;
    to["max.f64"] = PerLane<MaxD, double, double, double>::run;
    to["fma.f64"] = PerLane<FmaD, double, double, double, double>::run;
    to["neg.f64"] = PerLane<NegD, double, double>::run;
    to["abs.f64"] = PerLane<AbsD, double, double>::run;
    to["sqrt.f64"] = PerLane<SqrtD, double, double>::run;
    to["rcp.f64"] = PerLane<RcpD, double, double>::run;
    return to;
  }();
  return all;
}

bool decode_float(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string key = statement.opcode[0];
  for (size_t part = 1; part < statement.opcode.size(); ++part) {
    if (statement.opcode[part] != "rn") {  // the default
      key += "." + statement.opcode[part];
    }
  }
  auto const found = handlers().find(key);
  if (found == handlers().end()) {
    return decode_as_integer(decoder, statement, i);
  }
  i.run = found->second;
  for (ptx::Operand const& operand : statement.operands) {
    decoder.append(operand, i.at);
  }
  return true;
}

}  // namespace

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

void add_floats(DecodeTable& table) {
  for (auto const& [opcode, handler] : handlers()) {
    table[opcode.substr(0, opcode.find('.'))] = decode_float;
  }
}

}  // namespace emulator
