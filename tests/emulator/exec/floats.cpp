// Floating-point instructions. Those named like integer ones (add, min, ...) come here first.
#include "decoder.h"
#include "float_operations.h"

namespace emulator {

bool decode_as_integer(Decoder& decoder, ptx::Statement const& statement, Instruction& i);

namespace {

using namespace floats;

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
    to["tanh.approx.f32"] = one<TanhApproxF>();
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

void add_floats(DecodeTable& table) {
  for (auto const& [opcode, handler] : handlers()) {
    table[opcode.substr(0, opcode.find('.'))] = decode_float;
  }
}

}  // namespace emulator
