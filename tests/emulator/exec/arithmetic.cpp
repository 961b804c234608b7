// Integer and bit instructions.
#include "decoder.h"
#include "integer_operations.h"

namespace emulator {
namespace {

using namespace integers;

using Handlers = std::unordered_map<std::string, Handler>;

template <class T>
void add_type(Handlers& to, std::string const& type) {
  to["add." + type] = PerLane<Add<T>, T, T, T>::run;
  to["sub." + type] = PerLane<Sub<T>, T, T, T>::run;
  to["mul.lo." + type] = PerLane<MulLo<T>, T, T, T>::run;
  to["mul.hi." + type] = PerLane<MulHi<T>, T, T, T>::run;
  to["mad.lo." + type] = PerLane<MadLo<T>, T, T, T, T>::run;
  to["mad.hi." + type] = PerLane<MadHi<T>, T, T, T, T>::run;
  if constexpr (sizeof(T) < 8) {
    to["mul.wide." + type] = PerLane<MulWide<T>, wider<T>, T, T>::run;
    to["mad.wide." + type] = PerLane<MadWide<T>, wider<T>, T, T, wider<T>>::run;
  }
  to["div." + type] = PerLane<Div<T>, T, T, T>::run;
  to["rem." + type] = PerLane<Rem<T>, T, T, T>::run;
  to["min." + type] = PerLane<Min<T>, T, T, T>::run;
  to["max." + type] = PerLane<Max<T>, T, T, T>::run;
  to["neg." + type] = PerLane<Neg<T>, T, T>::run;
  to["abs." + type] = PerLane<Abs<T>, T, T>::run;
  to["shr." + type] = PerLane<Shr<T>, T, T, uint32_t>::run;
  to["bfind." + type] = PerLane<Bfind<T>, uint32_t, T>::run;
  to["bfind.shiftamt." + type] = PerLane<BfindShift<T>, uint32_t, T>::run;
  to["bfe." + type] = PerLane<Bfe<T>, T, T, uint32_t, uint32_t>::run;
}

template <class T>
void add_bits(Handlers& to, std::string const& type) {
  to["and." + type] = PerLane<And<T>, T, T, T>::run;
  to["or." + type] = PerLane<Or<T>, T, T, T>::run;
  to["xor." + type] = PerLane<Xor<T>, T, T, T>::run;
  to["not." + type] = PerLane<Not<T>, T, T>::run;
  if constexpr (!std::is_same_v<T, bool>) {
    to["shl." + type] = PerLane<Shl<T>, T, T, uint32_t>::run;
    to["shr." + type] = PerLane<Shr<T>, T, T, uint32_t>::run;
    to["popc." + type] = PerLane<Popc<T>, uint32_t, T>::run;
    to["clz." + type] = PerLane<Clz<T>, uint32_t, T>::run;
    to["brev." + type] = PerLane<Brev<T>, T, T>::run;
    to["bfi." + type] = PerLane<Bfi<T>, T, T, T, uint32_t, uint32_t>::run;
  }
}

Handlers const& handlers() {
  static Handlers const all = [] {
    Handlers to;
    add_type<uint16_t>(to, "u16");
    add_type<int16_t>(to, "s16");
    add_type<uint32_t>(to, "u32");
    add_type<int32_t>(to, "s32");
    add_type<uint64_t>(to, "u64");
    add_type<int64_t>(to, "s64");
    add_bits<bool>(to, "pred");
    add_bits<uint16_t>(to, "b16");
    add_bits<uint32_t>(to, "b32");
    add_bits<uint64_t>(to, "b64");
    to["lop3.b32"] = PerLane<Lop3, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["prmt.b32"] = PerLane<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["shf.l.wrap.b32"] = PerLane<Funnel<true, true>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["shf.l.clamp.b32"] =
        PerLane<Funnel<true, false>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["shf.r.wrap.b32"] =
        PerLane<Funnel<false, true>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["shf.r.clamp.b32"] =
        PerLane<Funnel<false, false>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["dp4a.u32.u32"] =
        PerLane<Dot4<uint8_t, uint8_t>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    to["dp4a.s32.s32"] = PerLane<Dot4<int8_t, int8_t>, uint32_t, uint32_t, uint32_t, uint32_t>::run;
    return to;
  }();
  return all;
}

bool decode_integer(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  auto const found = handlers().find(join(statement.opcode));
  if (found == handlers().end()) {
    return false;
  }
  i.run = found->second;
  for (ptx::Operand const& operand : statement.operands) {
    decoder.append(operand, i.at);
  }
  return true;
}

}  // namespace

void add_arithmetic(DecodeTable& table) {
  for (auto const& [opcode, handler] : handlers()) {
    table[opcode.substr(0, opcode.find('.'))] = decode_integer;
  }
}

bool decode_as_integer(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  return decode_integer(decoder, statement, i);
}

}  // namespace emulator
