// Instructions in which the lanes of a warp wait for each other.
#include "decoder.h"
#include "values.h"

namespace emulator {
namespace {

// The lanes named by the masks, if all of them are here. Lanes name themselves; those that have
// ended are not waited for. Several disjoint groups may be at the same instruction.
bool arrived(Warp& warp, uint64_t const* masks, uint32_t lanes) {
  bool all = true;
  each_lane(lanes, [&](int lane) {
    auto const mask = static_cast<uint32_t>(masks[lane]);
    if ((mask >> lane & 1) == 0) {
      fault("lane " + std::to_string(lane) + " is not in its own mask");
    }
    all &= (mask & warp.live & ~lanes) == 0;
  });
  return all;
}

// Registers: result, predicate, value, lane, clamp and segments, mask.
enum class Shuffle { kUp, kDown, kButterfly, kIndex };
template <Shuffle S>
Outcome shuffle(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!arrived(warp, warp.reg(i.at[5]), lanes)) {
    return Outcome::kBlocked;
  }
  uint64_t values[kLanes];
  std::memcpy(values, warp.reg(i.at[2]), sizeof values);
  uint64_t results[kLanes], inside[kLanes];
  each_lane(lanes, [&](int lane) {
    auto const b = static_cast<int>(warp.reg(i.at[3])[lane] & 31);
    auto const c = static_cast<uint32_t>(warp.reg(i.at[4])[lane]);
    int const clamp = static_cast<int>(c & 31), segment = static_cast<int>(c >> 8 & 31);
    int const high = (lane & segment) | (clamp & ~segment);
    int const low = lane & segment;
    int from = 0;
    bool is_inside = false;
    switch (S) {
      case Shuffle::kUp:
        from = lane - b;
        is_inside = from >= high;
        break;
      case Shuffle::kDown:
        from = lane + b;
        is_inside = from <= high;
        break;
      case Shuffle::kButterfly:
        from = lane ^ b;
        is_inside = from <= high;
        break;
      case Shuffle::kIndex:
        from = low | (b & ~segment);
        is_inside = from <= high;
        break;
    }
    from = is_inside ? from : lane;
    // A lane that does not take part has no value to give.
    results[lane] = (lanes >> from & 1) != 0 ? static_cast<uint32_t>(values[from]) : 0x7fdeadffu;
    inside[lane] = is_inside;
  });
  each_lane(lanes, [&](int lane) {
    warp.reg(i.at[1])[lane] = inside[lane];
    warp.reg(i.at[0])[lane] = results[lane];
  });
  return Outcome::kNext;
}

bool decode_shuffle(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  if (statement.opcode.at(1) != "sync" || statement.operands.size() != 5) {
    return false;
  }
  std::string const& way = statement.opcode.at(2);
  i.run = way == "up"     ? shuffle<Shuffle::kUp>
          : way == "down" ? shuffle<Shuffle::kDown>
          : way == "bfly" ? shuffle<Shuffle::kButterfly>
                          : shuffle<Shuffle::kIndex>;
  ptx::Operand const& to = statement.operands[0];
  i.at = {decoder.reg(to), to.second >= 0 ? to.second : decoder.sink()};
  for (size_t k = 1; k < 5; ++k) {
    i.at.push_back(decoder.reg(statement.operands[k]));
  }
  return true;
}

// Registers: result, value, mask. f(values of the lane's group, lanes of the group) -> result.
template <class F>
Outcome combine(Warp& warp, Instruction const& i, uint32_t lanes, F f) {
  uint64_t const* const masks = warp.reg(i.at[2]);
  if (!arrived(warp, masks, lanes)) {
    return Outcome::kBlocked;
  }
  uint64_t values[kLanes], results[kLanes];
  std::memcpy(values, warp.reg(i.at[1]), sizeof values);
  each_lane(lanes, [&](int lane) {
    results[lane] = f(values, static_cast<uint32_t>(masks[lane]) & lanes);
  });
  each_lane(lanes, [&](int lane) { warp.reg(i.at[0])[lane] = results[lane]; });
  return Outcome::kNext;
}

enum class Vote { kAll, kAny, kUniform, kBallot };
// value: 1 if the predicate is negated.
template <Vote V>
Outcome vote(Warp& warp, Instruction const& i, uint32_t lanes) {
  return combine(warp, i, lanes, [&](uint64_t const* values, uint32_t group) -> uint64_t {
    uint32_t yes = 0;
    each_lane(group, [&](int lane) {
      yes |= static_cast<uint32_t>((values[lane] ^ i.value) & 1) << lane;
    });
    switch (V) {
      case Vote::kAll:
        return yes == group;
      case Vote::kAny:
        return yes != 0;
      case Vote::kUniform:
        return yes == 0 || yes == group;
      case Vote::kBallot:
        return yes;
    }
    return 0;
  });
}

bool decode_vote(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& way = statement.opcode.at(2);
  i.run = way == "all"   ? vote<Vote::kAll>
          : way == "any" ? vote<Vote::kAny>
          : way == "uni" ? vote<Vote::kUniform>
                         : vote<Vote::kBallot>;
  i.value = statement.operands.at(1).negated;
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return statement.opcode[1] == "sync" && i.at.size() == 3;
}

template <class T, class F>
Outcome reduce(Warp& warp, Instruction const& i, uint32_t lanes) {
  return combine(warp, i, lanes, [](uint64_t const* values, uint32_t group) {
    T result = static_cast<T>(values[__builtin_ctz(group)]);
    each_lane(group & (group - 1),
              [&](int lane) { result = F{}(result, static_cast<T>(values[lane])); });
    return static_cast<uint64_t>(result);
  });
}
struct Less {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct More {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

bool decode_reduce(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const way = join(statement.opcode, 2);
  i.run = way == "add.s32" || way == "add.u32" ? reduce<uint32_t, std::plus<uint32_t>>
          : way == "and.b32"                   ? reduce<uint32_t, std::bit_and<uint32_t>>
          : way == "or.b32"                    ? reduce<uint32_t, std::bit_or<uint32_t>>
          : way == "xor.b32"                   ? reduce<uint32_t, std::bit_xor<uint32_t>>
          : way == "min.u32"                   ? reduce<uint32_t, Less>
          : way == "max.u32"                   ? reduce<uint32_t, More>
          : way == "min.s32"                   ? reduce<int32_t, Less>
          : way == "max.s32"                   ? reduce<int32_t, More>
                                               : nullptr;
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return i.run != nullptr && i.at.size() == 3;
}

Outcome match_any(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!arrived(warp, warp.reg(i.at[2]), lanes)) {
    return Outcome::kBlocked;
  }
  uint64_t results[kLanes];
  each_lane(lanes, [&](int lane) {
    uint32_t same = 0;
    each_lane(static_cast<uint32_t>(warp.reg(i.at[2])[lane]) & lanes, [&](int other) {
      uint64_t const differs = (warp.reg(i.at[1])[lane] ^ warp.reg(i.at[1])[other]) & i.value;
      same |= uint32_t{differs == 0} << other;
    });
    results[lane] = same;
  });
  each_lane(lanes, [&](int lane) { warp.reg(i.at[0])[lane] = results[lane]; });
  return Outcome::kNext;
}

bool decode_match(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.run = match_any;
  i.value = statement.opcode.back() == "b64" ? ~0ull : 0xffffffffull;
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return statement.opcode.at(1) == "any";
}

// One lane of the mask is chosen: here the lowest. Registers: its number, the predicate, the mask.
Outcome elect(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!arrived(warp, warp.reg(i.at[2]), lanes)) {
    return Outcome::kBlocked;
  }
  uint64_t chosen[kLanes];
  each_lane(lanes, [&](int lane) {
    chosen[lane] = __builtin_ctz(static_cast<uint32_t>(warp.reg(i.at[2])[lane]) & lanes);
  });
  each_lane(lanes, [&](int lane) {
    warp.reg(i.at[0])[lane] = chosen[lane];
    warp.reg(i.at[1])[lane] = chosen[lane] == static_cast<uint64_t>(lane);
  });
  return Outcome::kNext;
}

bool decode_elect(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.run = elect;
  ptx::Operand const& to = statement.operands.at(0);
  i.at = {decoder.reg(to), to.second, decoder.reg(statement.operands.at(1))};
  return to.second >= 0;
}

Outcome active(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp.reg(i.at[0])[lane] = lanes; });
  return Outcome::kNext;
}

bool decode_active(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.run = active;
  i.at = {decoder.reg(statement.operands.at(0))};
  return true;
}

}  // namespace

bool lanes_arrived(Warp& warp, uint64_t const* masks, uint32_t lanes) {
  return arrived(warp, masks, lanes);
}

void add_lane_exchanges(DecodeTable& table) {
  table["shfl"] = decode_shuffle;
  table["vote"] = decode_vote;
  table["redux"] = decode_reduce;
  table["match"] = decode_match;
  table["elect"] = decode_elect;
  table["activemask"] = decode_active;
}

}  // namespace emulator
