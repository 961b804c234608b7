// cp.async without bulk: copies of single threads, which land late.
#include "../units/mbarrier.h"
#include "addresses.h"

namespace emulator {
namespace {

void land(Warp& warp, ThreadCopy const& copy) {
  Block& block = *warp.block;
  std::byte* const to = shared_at(block, copy.to, copy.bytes);
  std::memcpy(to, copy.from, copy.filled);
  std::memset(to + copy.filled, 0, copy.bytes - copy.filled);
  block.order.written(copy.to, copy.bytes, warp.index * kLanes + copy.lane);
  ++block.grid->progress;
}

// Lands the copies for which `now` is true.
template <class F>
void land_some(Warp& warp, F now) {
  size_t kept = 0;
  for (ThreadCopy const& copy : warp.copies) {
    if (now(copy)) {
      land(warp, copy);
    } else {
      warp.copies[kept++] = copy;
    }
  }
  warp.copies.resize(kept);
}

// Registers: the shared address, the global one, the bytes that are copied.
Outcome copy(Warp& warp, Instruction const& i, uint32_t lanes) {
  Grid& grid = *warp.block->grid;
  bool const late = grid.late || grid.draw(2) == 0;
  each_lane(lanes, [&](int lane) {
    auto const filled = static_cast<uint32_t>(warp.reg(i.at[2])[lane]);
    if (filled > i.bytes) {
      fault("cp.async of " + std::to_string(filled) + " bytes of " + std::to_string(i.bytes));
    }
    auto const to = static_cast<uint32_t>(warp.reg(i.at[0])[lane] + i.offset);
    shared_at(*warp.block, to, i.bytes);
    uint64_t const from = warp.reg(i.at[1])[lane] + i.value;
    ThreadCopy const copy{static_cast<uint8_t>(lane),
                          warp.copy_group[lane],
                          to,
                          filled == 0 ? nullptr : host_at(from, i.bytes),
                          i.bytes,
                          filled};
    if (late) {
      warp.copies.push_back(copy);
    } else {
      land(warp, copy);
    }
  });
  return Outcome::kNext;
}

Outcome commit(Warp& warp, Instruction const&, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { ++warp.copy_group[lane]; });
  return Outcome::kNext;
}

// value: the groups that may be pending afterwards.
Outcome wait_group(Warp& warp, Instruction const& i, uint32_t lanes) {
  land_some(warp, [&](ThreadCopy const& copy) {
    return (lanes >> copy.lane & 1) && copy.group + i.value < warp.copy_group[copy.lane];
  });
  return Outcome::kNext;
}
Outcome wait_all(Warp& warp, Instruction const&, uint32_t lanes) {
  land_some(warp, [&](ThreadCopy const& copy) { return (lanes >> copy.lane & 1) != 0; });
  return Outcome::kNext;
}

// Arrives once the lane's copies up to here have landed. count: the arrival is not among those that
// the barrier expects, so it is added to them.
Outcome arrive(Warp& warp, Instruction const& i, uint32_t lanes) {
  Block& block = *warp.block;
  if (i.count != 0) {
    fault("cp.async.mbarrier.arrive without .noinc is not emulated");
  }
  each_lane(lanes, [&](int lane) {
    auto* const word = reinterpret_cast<uint64_t*>(data_at<true>(warp, i, i.at[0], lane, 8));
    uint32_t const group = warp.copy_group[lane]++;  // so that later copies are not among these
    block.late.push_back({block.grid->landing(), word, i.line, [&warp, lane, group, word] {
                            land_some(warp, [&](ThreadCopy const& copy) {
                              return copy.lane == lane && copy.group <= group;
                            });
                            Mbarrier(*word).arrive(1);
                          }});
  });
  return Outcome::kNext;
}

}  // namespace

bool decode_thread_copy(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& what = statement.opcode.at(2);
  auto const& operands = statement.operands;
  if (what == "commit_group") {
    i.run = commit;
  } else if (what == "wait_all") {
    i.run = wait_all;
  } else if (what == "wait_group") {
    i.run = wait_group;
    i.value = decoder.immediate(statement, 0);
  } else if (what == "mbarrier") {
    i.run = arrive;
    i.count = !has_part(statement, "noinc");
    decoder.address(operands.at(0), i);
  } else if (what == "ca" || what == "cg") {
    i.run = copy;
    i.bytes = static_cast<uint32_t>(decoder.immediate(statement, 2));
    Instruction from;
    decoder.address(operands.at(1), from);
    decoder.address(operands.at(0), i);
    i.at.push_back(from.at[0]);
    i.value = static_cast<uint64_t>(from.offset);
    bool const hint = has_part(statement, "L2::cache_hint");
    bool const filled = operands.size() > (hint ? 4u : 3u);
    i.at.push_back(filled ? decoder.reg(operands[3]) : decoder.constant(i.bytes));
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
