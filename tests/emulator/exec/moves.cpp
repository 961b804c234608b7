// mov, selp, setp and address conversions.
#include "decoder.h"
#include "values.h"

namespace emulator {
namespace {

Outcome move(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint64_t* const to = warp.reg(i.at[0]);
  uint64_t const* const from = warp.reg(i.at[1]);
  if (lanes == kAllLanes) {
    std::memcpy(to, from, kLanes * sizeof *to);
  } else {
    each_lane(lanes, [&](int lane) { to[lane] = from[lane]; });
  }
  return Outcome::kNext;
}

// mov.b32 d, {a, b}: `bytes` of each element.
Outcome pack(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t const bits = 8 * i.bytes;
  uint64_t const mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  each_lane(lanes, [&](int lane) {
    uint64_t result = 0;
    for (uint32_t k = 0; k < i.count; ++k) {
      result |= (warp.reg(i.at[k + 1])[lane] & mask) << (bits * k);
    }
    warp.reg(i.at[0])[lane] = result;
  });
  return Outcome::kNext;
}

// mov.b32 {a, b}, d
Outcome unpack(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t const bits = 8 * i.bytes;
  each_lane(lanes, [&](int lane) {
    uint64_t const value = warp.reg(i.at[i.count])[lane];
    for (uint32_t k = 0; k < i.count; ++k) {
      warp.reg(i.at[k])[lane] = value >> (bits * k) & ((1ull << bits) - 1);
    }
  });
  return Outcome::kNext;
}

uint32_t bytes_of(std::string const& type) {
  return type == "pred" ? 1
                        : static_cast<uint32_t>(
                              std::stoul(type.substr(type[0] == 'b' && type[1] == 'f' ? 2 : 1))) /
                              8;
}

bool decode_move(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  ptx::Operand const& to = statement.operands.at(0);
  ptx::Operand const& from = statement.operands.at(1);
  using Kind = ptx::Operand::Kind;
  i.run = move;
  if (to.kind == Kind::kVector || from.kind == Kind::kVector) {
    i.run = to.kind == Kind::kVector ? unpack : pack;
    i.count =
        static_cast<uint32_t>((to.kind == Kind::kVector ? to.elements : from.elements).size());
    i.bytes = bytes_of(statement.opcode.back()) / i.count;
  }
  decoder.append(to, i.at);
  decoder.append(from, i.at);
  return true;
}

// %clock and its like, which change.
Outcome read_clock(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp.reg(i.at[0])[lane] = warp.block->grid->round * 16; });
  return Outcome::kNext;
}

bool decode_mov_or_clock(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  if (!decode_move(decoder, statement, i)) {
    return false;
  }
  if (decoder.is_clock(statement.operands.at(1))) {
    i.run = read_clock;
  }
  return true;
}

Outcome select(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint64_t* const to = warp.reg(i.at[0]);
  uint64_t const* const a = warp.reg(i.at[1]);
  uint64_t const* const b = warp.reg(i.at[2]);
  uint64_t const* const p = warp.reg(i.at[3]);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t const chosen = p[lane] & 1 ? a[lane] : b[lane];
    to[lane] = lanes >> lane & 1 ? chosen : to[lane];
  }
  return Outcome::kNext;
}

bool decode_select(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.run = select;
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return i.at.size() == 4;
}

// Comparisons: the ordered ones are false for NaN, the unordered ones (u...) true.
enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe };
template <Compare C, bool kUnordered, class T>
bool compare(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) {
      return kUnordered;
    }
  }
  switch (C) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a != b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
  }
}
template <class T>
auto comparable(T x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return x;
  } else {
    return to_float(x);
  }
}
// value: how the result is combined with a third predicate, if there is one.
enum Combination : uint64_t { kAlone, kAnd, kOr, kXor };
template <Compare C, bool kUnordered, class T>
Outcome set_predicate(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint64_t* const p = warp.reg(i.at[0]);
  uint64_t* const q = warp.reg(i.at[1]);
  uint64_t const* const a = warp.reg(i.at[2]);
  uint64_t const* const b = warp.reg(i.at[3]);
  uint64_t const* const c = warp.reg(i.at[4]);
  each_lane(lanes, [&](int lane) {
    bool const is =
        compare<C, kUnordered>(comparable(read<T>(a[lane])), comparable(read<T>(b[lane])));
    bool const other = ((c[lane] ^ i.offset) & 1) != 0;  // offset 1: of !c
    auto const combined = [&](bool x) -> uint64_t {
      switch (i.value) {
        case kAnd:
          return x && other;
        case kOr:
          return x || other;
        case kXor:
          return x != other;
        default:
          return x;
      }
    };
    uint64_t const yes = combined(is), no = combined(!is);
    q[lane] = no;
    p[lane] = yes;
  });
  return Outcome::kNext;
}

template <class T>
Handler comparison(std::string const& name) {
  if (name == "eq") {
    return set_predicate<Compare::kEq, false, T>;
  }
  if (name == "ne") {
    return set_predicate<Compare::kNe, false, T>;
  }
  if (name == "lt" || name == "lo") {
    return set_predicate<Compare::kLt, false, T>;
  }
  if (name == "le" || name == "ls") {
    return set_predicate<Compare::kLe, false, T>;
  }
  if (name == "gt" || name == "hi") {
    return set_predicate<Compare::kGt, false, T>;
  }
  if (name == "ge" || name == "hs") {
    return set_predicate<Compare::kGe, false, T>;
  }
  if (name == "equ") {
    return set_predicate<Compare::kEq, true, T>;
  }
  if (name == "neu") {
    return set_predicate<Compare::kNe, true, T>;
  }
  if (name == "ltu") {
    return set_predicate<Compare::kLt, true, T>;
  }
  if (name == "leu") {
    return set_predicate<Compare::kLe, true, T>;
  }
  if (name == "gtu") {
    return set_predicate<Compare::kGt, true, T>;
  }
  if (name == "geu") {
    return set_predicate<Compare::kGe, true, T>;
  }
  return nullptr;
}

Handler comparison(std::string const& name, std::string const& type) {
  if (type == "u16" || type == "b16") {
    return comparison<uint16_t>(name);
  }
  if (type == "s16") {
    return comparison<int16_t>(name);
  }
  if (type == "u32" || type == "b32") {
    return comparison<uint32_t>(name);
  }
  if (type == "s32") {
    return comparison<int32_t>(name);
  }
  if (type == "u64" || type == "b64") {
    return comparison<uint64_t>(name);
  }
  if (type == "s64") {
    return comparison<int64_t>(name);
  }
  if (type == "f32") {
    return comparison<float>(name);
  }
  if (type == "f64") {
    return comparison<double>(name);
  }
  if (type == "f16") {
    return comparison<Half>(name);
  }
  if (type == "bf16") {
    return comparison<BFloat>(name);
  }
  return nullptr;
}

bool decode_comparison(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  size_t const parts = statement.opcode.size();
  for (size_t part = 2; part + 1 < parts; ++part) {
    std::string const& name = statement.opcode[part];
    i.value = name == "and" ? kAnd : name == "or" ? kOr : name == "xor" ? kXor : i.value;
    if (name != "and" && name != "or" && name != "xor") {
      return false;  // .ftz among them
    }
  }
  i.run = comparison(statement.opcode.at(1), statement.opcode.back());
  ptx::Operand const& to = statement.operands.at(0);
  i.at = {decoder.reg(to), to.second >= 0 ? to.second : decoder.sink(),
          decoder.reg(statement.operands.at(1)), decoder.reg(statement.operands.at(2)), 0};
  i.at[4] = i.value == kAlone ? i.at[2] : decoder.reg(statement.operands.at(3));
  i.offset = i.value != kAlone && statement.operands[3].negated;
  return i.run != nullptr;
}

// Generic addresses are host addresses, also those of shared memory.
Outcome shared_to_generic(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    auto const address = static_cast<uint32_t>(warp.reg(i.at[1])[lane]);
    warp.reg(i.at[0])[lane] = reinterpret_cast<uint64_t>(warp.block->shared.data) + address;
  });
  return Outcome::kNext;
}
Outcome generic_to_shared(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    warp.reg(i.at[0])[lane] =
        warp.reg(i.at[1])[lane] - reinterpret_cast<uint64_t>(warp.block->shared.data);
  });
  return Outcome::kNext;
}

bool decode_address(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  bool const to = statement.opcode.at(1) == "to";
  std::string const& space = statement.opcode.at(to ? 2 : 1);
  if (space == "shared" || space == "shared::cta") {
    i.run = to ? generic_to_shared : shared_to_generic;
  } else if (space == "global" || space == "local" || space == "const" || space == "param") {
    i.run = move;
  } else {
    return false;
  }
  i.at = {decoder.reg(statement.operands.at(0)), decoder.reg(statement.operands.at(1))};
  return true;
}

}  // namespace

void add_moves(DecodeTable& table) {
  table["mov"] = decode_mov_or_clock;
  table["selp"] = decode_select;
  table["setp"] = decode_comparison;
  table["cvta"] = decode_address;
}

}  // namespace emulator
