// atom and red. One lane after another: no two are at once.
#include "addresses.h"

namespace emulator {
namespace {

struct Add {
  template <class T>
  static T run(T a, T b, T) {
    return a + b;
  }
};
struct Min {
  template <class T>
  static T run(T a, T b, T) {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  static T run(T a, T b, T) {
    return a < b ? b : a;
  }
};
struct And {
  template <class T>
  static T run(T a, T b, T) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T run(T a, T b, T) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T run(T a, T b, T) {
    return a ^ b;
  }
};
struct Exchange {
  template <class T>
  static T run(T, T b, T) {
    return b;
  }
};
struct CompareSwap {
  template <class T>
  static T run(T a, T b, T c) {
    return a == b ? c : a;
  }
};
struct Inc {
  template <class T>
  static T run(T a, T b, T) {
    return a >= b ? 0 : a + 1;
  }
};
struct Dec {
  template <class T>
  static T run(T a, T b, T) {
    return a == 0 || a > b ? b : a - 1;
  }
};

// Registers: the address, the `count` results, the arguments, the second arguments (for cas).
template <bool kShared, class F, class T>
Outcome update(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    std::byte* const at = data_at<kShared>(warp, i, i.at[0], lane, i.count * sizeof(T));
    for (uint32_t k = 0; k < i.count; ++k) {
      T before;
      std::memcpy(&before, at + k * sizeof(T), sizeof(T));
      T const after = F::run(before, read<T>(warp.reg(i.at[1 + i.count + k])[lane]),
                             read<T>(warp.reg(i.at[1 + 2 * i.count + k])[lane]));
      std::memcpy(at + k * sizeof(T), &after, sizeof(T));
      warp.reg(i.at[1 + k])[lane] = write<T>(before);
    }
    note_write<kShared>(warp, i, i.at[0], lane, i.count * sizeof(T));
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

template <bool kShared, class F, bool kBits = false>
Handler by_type(std::string const& type) {
  if (type == "u32" || type == "b32") {
    return update<kShared, F, uint32_t>;
  }
  if (type == "s32") {
    return update<kShared, F, int32_t>;
  }
  if (type == "u64" || type == "b64") {
    return update<kShared, F, uint64_t>;
  }
  if (type == "s64") {
    return update<kShared, F, int64_t>;
  }
  if constexpr (!kBits) {
    if (type == "f32") {
      return update<kShared, F, float>;
    }
    if (type == "f64") {
      return update<kShared, F, double>;
    }
  }
  return nullptr;
}

template <bool kShared>
Handler handler(ptx::Statement const& statement) {
  std::string const& type = statement.opcode.back();
  bool const is_float = type[0] == 'f';
  if (has_part(statement, "add")) {
    return by_type<kShared, Add>(type);
  }
  if (has_part(statement, "exch")) {
    return by_type<kShared, Exchange, true>(type);
  }
  if (is_float) {
    return nullptr;
  }
  if (has_part(statement, "min")) {
    return by_type<kShared, Min>(type);
  }
  if (has_part(statement, "max")) {
    return by_type<kShared, Max>(type);
  }
  if (has_part(statement, "and")) {
    return by_type<kShared, And, true>(type);
  }
  if (has_part(statement, "or")) {
    return by_type<kShared, Or, true>(type);
  }
  if (has_part(statement, "xor")) {
    return by_type<kShared, Xor, true>(type);
  }
  if (has_part(statement, "cas")) {
    return by_type<kShared, CompareSwap, true>(type);
  }
  if (has_part(statement, "inc")) {
    return by_type<kShared, Inc, true>(type);
  }
  if (has_part(statement, "dec")) {
    return by_type<kShared, Dec, true>(type);
  }
  return nullptr;
}

bool decode_atomic(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  bool const returns = statement.opcode[0] == "atom";
  i.run = in_shared(statement) ? handler<true>(statement) : handler<false>(statement);
  i.count = vector_size(statement);
  size_t next = returns ? 1 : 0;
  decoder.address(statement.operands.at(next++), i);
  for (uint32_t k = 0; k < i.count && !returns; ++k) {
    i.at.push_back(decoder.sink());
  }
  if (returns) {
    decoder.append(statement.operands[0], i.at);
  }
  decoder.append(statement.operands.at(next), i.at);
  decoder.append(statement.operands.at(has_part(statement, "cas") ? next + 1 : next), i.at);
  return i.run != nullptr && i.at.size() == 1 + 3 * i.count &&
         !has_part(statement, "shared::cluster") && statement.opcode.at(1) != "async";
}

}  // namespace

void add_atomics(DecodeTable& table) {
  table["atom"] = decode_atomic;
  table["red"] = decode_atomic;
}

}  // namespace emulator
