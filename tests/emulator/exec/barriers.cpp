// bar, barrier, bar.warp and mbarrier.
#include "barriers.h"

#include <algorithm>

#include "../units/mbarrier.h"
#include "addresses.h"

namespace emulator {

bool lanes_arrived(Warp& warp, uint64_t const* masks, uint32_t lanes);

namespace {

void move_on(Warp& warp, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { ++warp.pc[lane]; });
  warp.parked &= ~lanes;
  warp.waiting &= ~lanes;
}

enum class Wait : uint64_t { kSync, kArrive, kAnd, kOr, kPopc };

// Registers of bar.red: the result, the predicate; then of all: the barrier, the count if it has
// one. count: whether the predicate is negated; bytes: whether the whole warp takes part.
bool is_reduction(Instruction const& i) { return i.value >= static_cast<uint64_t>(Wait::kAnd); }

void complete(Block& block, NamedBarrier& barrier) {
  uint32_t sum = 0, total = 0;
  auto const instruction_of = [&](NamedBarrier::Arrival const& arrival) -> Instruction const& {
    return instruction_at(block, arrival.warp->pc[__builtin_ctz(arrival.lanes)]);
  };
  for (auto const& arrival : barrier.arrivals) {
    if (!arrival.waits) {
      continue;
    }
    Instruction const& i = instruction_of(arrival);
    if (is_reduction(i)) {
      each_lane(arrival.lanes, [&](int lane) {
        sum += static_cast<uint32_t>((arrival.warp->reg(i.at[1])[lane] ^ i.count) & 1);
        ++total;
      });
    }
  }
  for (auto const& arrival : barrier.arrivals) {
    if (!arrival.waits) {
      continue;
    }
    Instruction const& i = instruction_of(arrival);
    if (is_reduction(i)) {
      auto const way = static_cast<Wait>(i.value);
      uint32_t const result = way == Wait::kPopc  ? sum
                              : way == Wait::kAnd ? uint32_t{sum == total}
                                                  : uint32_t{sum != 0};
      each_lane(arrival.lanes, [&](int lane) { arrival.warp->reg(i.at[0])[lane] = result; });
    }
    move_on(*arrival.warp, arrival.lanes);
  }
  barrier = {};
  ++block.grid->progress;
}

uint32_t threads_of_live_warps(Block const& block) {
  uint32_t result = 0;
  for (Warp const& warp : block.warps) {
    result += warp.live != 0 ? kLanes : 0;
  }
  return result;
}

void complete_if_full(Block& block, NamedBarrier& barrier) {
  uint32_t const expected = barrier.expected != 0 ? barrier.expected : threads_of_live_warps(block);
  if (barrier.arrived > expected) {
    fault("a barrier has more arrivals than the " + std::to_string(expected) + " it expects");
  }
  if (barrier.arrived == expected && barrier.arrived != 0) {
    complete(block, barrier);
  }
}

Outcome wait_at_barrier(Warp& warp, Instruction const& i, uint32_t lanes) {
  bool const whole = i.bytes != 0;
  if (whole && !all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  Block& block = *warp.block;
  size_t const first = is_reduction(i) ? 2 : 0;
  int const leader = __builtin_ctz(lanes);
  uint64_t const name = static_cast<uint32_t>(warp.reg(i.at[first])[leader]);
  auto const count =
      i.at.size() > first + 1 ? static_cast<uint32_t>(warp.reg(i.at[first + 1])[leader]) : 0u;
  if (name >= 16) {
    fault("there is no barrier " + std::to_string(name));
  }
  if (count % kLanes != 0) {
    fault("a barrier's count must be a multiple of 32; got " + std::to_string(count));
  }
  NamedBarrier& barrier = block.barriers[name];
  if (barrier.arrived != 0 && barrier.expected != count) {
    fault("barrier " + std::to_string(name) + " has different counts: " +
          std::to_string(barrier.expected) + " and " + std::to_string(count));
  }
  bool const waits = i.value != static_cast<uint64_t>(Wait::kArrive);
  barrier.expected = count;
  barrier.arrived += whole ? kLanes : static_cast<uint32_t>(__builtin_popcount(lanes));
  barrier.arrivals.push_back({&warp, lanes, waits});
  ++block.grid->progress;
  if (waits) {
    warp.parked |= lanes;
  } else {
    each_lane(lanes, [&](int lane) { ++warp.pc[lane]; });
  }
  complete_if_full(block, barrier);
  return Outcome::kBranched;
}

// Registers: the masks. The lanes may be at different instructions.
Outcome wait_in_warp(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t const here = lanes | warp.parked_in_warp;
  bool all = true;
  uint32_t named = 0;
  each_lane(lanes, [&](int lane) {
    auto const mask = static_cast<uint32_t>(warp.reg(i.at[0])[lane]);
    all &= (mask & warp.live & ~here) == 0;
    named |= mask;
  });
  if (all) {
    uint32_t const others = warp.parked_in_warp & named & ~lanes;
    move_on(warp, lanes | others);
    warp.parked_in_warp &= ~others;
  } else {
    warp.parked |= lanes;
    warp.parked_in_warp |= lanes;
  }
  return Outcome::kBranched;
}

bool decode_barrier(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.moves_lanes = true;
  if (statement.opcode.at(1) == "warp") {
    i.run = wait_in_warp;
    i.at = {decoder.reg(statement.operands.at(0))};
    return true;
  }
  i.run = wait_at_barrier;
  i.bytes = statement.opcode[0] == "bar" || has_part(statement, "aligned");
  size_t next = 0;
  Wait way = Wait::kSync;
  if (has_part(statement, "arrive")) {
    way = Wait::kArrive;
  } else if (has_part(statement, "red")) {
    way = has_part(statement, "and")  ? Wait::kAnd
          : has_part(statement, "or") ? Wait::kOr
                                      : Wait::kPopc;
    i.at = {decoder.reg(statement.operands.at(0)), decoder.reg(statement.operands.back())};
    i.count = statement.operands.back().negated;
    next = 1;
  } else if (!has_part(statement, "sync")) {
    return false;  // barrier.cluster among them
  }
  i.value = static_cast<uint64_t>(way);
  size_t const end = statement.operands.size() - (way >= Wait::kAnd ? 1 : 0);
  for (; next < end; ++next) {
    i.at.push_back(decoder.reg(statement.operands[next]));
  }
  return !has_part(statement, "cluster");
}

Mbarrier mbarrier_at(Warp& warp, Instruction const& i, int32_t base, int lane) {
  return Mbarrier(*reinterpret_cast<uint64_t*>(data_at<true>(warp, i, base, lane, 8)));
}

// Registers: the address, and what follows it.
Outcome init(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    mbarrier_at(warp, i, i.at[0], lane).init(static_cast<uint32_t>(warp.reg(i.at[1])[lane]));
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}
Outcome invalidate(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { mbarrier_at(warp, i, i.at[0], lane).invalidate(); });
  return Outcome::kNext;
}

enum class Arrive { kPlain, kDrop, kExpect, kExpectOnly };
// Registers: the address, the state, the count or the bytes.
template <Arrive A>
Outcome arrive(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    Mbarrier barrier = mbarrier_at(warp, i, i.at[0], lane);
    auto const n = static_cast<uint32_t>(warp.reg(i.at[2])[lane]);
    uint64_t state = 0;
    switch (A) {
      case Arrive::kPlain:
        state = barrier.arrive(n);
        break;
      case Arrive::kDrop:
        state = barrier.arrive_drop(n);
        break;
      case Arrive::kExpect:
        state = barrier.arrive_expect_tx(n);
        break;
      case Arrive::kExpectOnly:
        barrier.expect_tx(n);
        break;
    }
    warp.reg(i.at[1])[lane] = state;
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

// Copies land late so that what does not wait for them reads what was there before.
void land_soon(Block& block, std::byte const* barrier) {
  for (LateCopy& copy : block.late) {
    if (reinterpret_cast<std::byte const*>(copy.barrier) == barrier) {
      copy.due = std::min(copy.due, block.grid->round + 1 + block.grid->draw(3));
    }
  }
}

// Registers: the address, the result, the state or the parity. try_wait may wait a while before it
// says no; test_wait does not (value 0).
template <bool kParity>
Outcome wait(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t yes = 0;
  each_lane(lanes, [&](int lane) {
    uint64_t const which = warp.reg(i.at[2])[lane];
    Mbarrier const barrier = mbarrier_at(warp, i, i.at[0], lane);
    bool const done =
        kParity ? barrier.test_wait_parity(static_cast<uint32_t>(which)) : barrier.test_wait(which);
    yes |= uint32_t{done} << lane;
    if (!done) {
      land_soon(*warp.block, data_at<true>(warp, i, i.at[0], lane, 8));
    }
  });
  if (yes != lanes && i.value != 0 && warp.polls > 0) {
    --warp.polls;
    return Outcome::kBlocked;
  }
  warp.polls = warp.block->grid->draw(4);
  each_lane(lanes, [&](int lane) { warp.reg(i.at[1])[lane] = yes >> lane & 1; });
  return yes == lanes ? Outcome::kNext : Outcome::kYielded;
}

bool decode_mbarrier(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& what = statement.opcode.at(1);
  auto const& operands = statement.operands;
  if (has_part(statement, "shared::cluster") || has_part(statement, "noComplete")) {
    return false;
  }
  bool const shared = in_shared(statement);
  if (!shared) {
    return false;  // generic addresses
  }
  if (what == "init" || what == "inval") {
    i.run = what == "init" ? init : invalidate;
    decoder.address(operands.at(0), i);
    if (what == "init") {
      i.at.push_back(decoder.reg(operands.at(1)));
    }
    return true;
  }
  if (what == "expect_tx") {
    i.run = arrive<Arrive::kExpectOnly>;
    decoder.address(operands.at(0), i);
    i.at.push_back(decoder.sink());
    i.at.push_back(decoder.reg(operands.at(1)));
    return true;
  }
  decoder.address(operands.at(1), i);
  i.at.push_back(decoder.reg(operands.at(0)));
  if (what == "arrive" || what == "arrive_drop") {
    bool const expects = has_part(statement, "expect_tx");
    if (expects && what == "arrive_drop") {
      return false;
    }
    i.run = expects                 ? arrive<Arrive::kExpect>
            : what == "arrive_drop" ? arrive<Arrive::kDrop>
                                    : arrive<Arrive::kPlain>;
    i.at.push_back(operands.size() > 2 ? decoder.reg(operands[2]) : decoder.constant(1));
    return true;
  }
  if (what == "try_wait" || what == "test_wait") {
    i.run = has_part(statement, "parity") ? wait<true> : wait<false>;
    i.value = what == "try_wait";
    i.at.push_back(decoder.reg(operands.at(2)));
    return true;
  }
  return false;
}

}  // namespace

void warp_ended(Block& block) {
  for (NamedBarrier& barrier : block.barriers) {
    if (barrier.arrived != 0 && barrier.expected == 0) {
      complete_if_full(block, barrier);
    }
  }
}

void add_barriers(DecodeTable& table) {
  table["bar"] = decode_barrier;
  table["barrier"] = decode_barrier;
  table["mbarrier"] = decode_mbarrier;
}

}  // namespace emulator
