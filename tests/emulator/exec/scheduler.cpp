// Which lanes of a warp run: those with the lowest program counter, so that lanes that took
// different branches come together again.
#include "scheduler.h"

#include <algorithm>
#include <sstream>

#include "bad_access.h"
#include "barriers.h"

namespace emulator {
namespace {

void set_pc(Warp& warp, uint32_t lanes, int32_t pc) {
  each_lane(lanes, [&](int lane) { warp.pc[lane] = pc; });
}

uint32_t guarded(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (i.guard < 0) {
    return lanes;
  }
  uint64_t const* const guard = warp.reg(i.guard);
  uint32_t yes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    yes |= static_cast<uint32_t>(guard[lane] & 1) << lane;
  }
  return lanes & (i.guard_negated ? ~yes : yes);
}

// Products of wgmma are in registers only after wgmma.wait_group.
void check_finished(Warp const& warp, Instruction const& i) {
  size_t const first = i.writes_late ? i.count : 0;
  for (size_t k = first; k < i.at.size(); ++k) {
    if (warp.unfinished[i.at[k]] != 0) {
      fault("uses an accumulator of wgmma before the wgmma.wait_group for it");
    }
  }
}

struct Group {
  uint32_t lanes = 0;
  int32_t pc = 0;
  int32_t limit = 0;  // the next program counter at which other lanes are
};

Group choose(Warp& warp, uint32_t candidates) {
  constexpr int32_t kFar = 1 << 30;
  Group group{0, kFar, kFar};
  each_lane(candidates, [&](int lane) { group.pc = std::min(group.pc, warp.pc[lane]); });
  each_lane(warp.live & ~warp.parked, [&](int lane) {
    if (warp.pc[lane] == group.pc) {
      group.lanes |= 1u << lane;
    } else if (warp.pc[lane] > group.pc) {
      group.limit = std::min(group.limit, warp.pc[lane]);
    }
  });
  return group;
}

// Runs a group until it must be chosen anew. Leaves the program counters in the warp.
void run_group(Warp& warp, Group& group, uint32_t& quantum) {
  Code const& code = *warp.block->grid->code;
  bool const alone = group.lanes == (warp.live & ~warp.parked);
  for (; quantum > 0 && group.pc < group.limit; --quantum) {
    Instruction const& i = code.instructions[group.pc];
    uint32_t const lanes = guarded(warp, i, group.lanes);
    if (lanes == 0) {
      ++group.pc;
      continue;
    }
    if (warp.unfinished_count != 0) {
      check_finished(warp, i);
    }
    if (code.has_products && !i.writes_late) {
      for (int32_t const reg : i.at) {
        warp.accessed[reg] = 1;
      }
    }
    if (i.moves_lanes) {
      set_pc(warp, lanes, group.pc);
    }
    Outcome const outcome = i.run(warp, i, lanes);
    if (outcome == Outcome::kNext) {
      ++group.pc;
      continue;
    }
    set_pc(warp, group.lanes & ~lanes, group.pc + 1);
    switch (outcome) {
      case Outcome::kBlocked:
        set_pc(warp, lanes, group.pc);
        warp.waiting |= lanes;
        return;
      case Outcome::kYielded:
        set_pc(warp, lanes, group.pc + 1);
        warp.waiting |= group.lanes;
        return;
      case Outcome::kBranched:
        if (alone && lanes == group.lanes && !i.moves_lanes) {
          group.pc = i.target;
          continue;
        }
        return;
      default:
        if (warp.live == 0) {
          warp_ended(*warp.block);
        }
        return;
    }
  }
  set_pc(warp, group.lanes, group.pc);
}

}  // namespace

void ProxyOrder::check(uint32_t address, uint32_t bytes, uint32_t thread) const {
  for (uint32_t k = address / 16; k <= (address + bytes - 1) / 16; ++k) {
    Write const& write = writes_[k];
    if (write.thread != 0 && fences_[write.thread - 1] <= write.time &&
        fences_[thread] <= write.time) {
      fault("reads shared address " + std::to_string(16 * k) + ", which thread " +
            std::to_string(write.thread - 1) + " has written, without fence.proxy.async between");
    }
  }
}

void run_warp(Warp& warp, uint32_t quantum) {
  Group group;
  report_place(warp.block->grid->code, &group.pc);
  try {
    while (quantum > 0) {
      uint32_t const candidates = warp.live & ~warp.parked & ~warp.waiting;
      if (candidates == 0) {
        warp.waiting = 0;
        report_place(nullptr, nullptr);
        return;
      }
      group = choose(warp, candidates);
      warp.waiting &= ~group.lanes;
      run_group(warp, group, quantum);
    }
  } catch (std::runtime_error const& error) {
    Code const& code = *warp.block->grid->code;
    Dim3 const& at = warp.block->index;
    std::ostringstream text;
    text << "kernel " << code.name << ", block (" << at.x << ", " << at.y << ", " << at.z
         << "), warp " << warp.index << ", PTX line " << code.instructions[group.pc].line << " ("
         << code.opcodes[group.pc] << "): " << error.what();
    throw Error(text.str());
  }
  report_place(nullptr, nullptr);
  // Lanes that wait in a loop for others of their warp must let them run.
  if (group.lanes != (warp.live & ~warp.parked) && ++warp.turns % 8 == 0) {
    warp.waiting |= group.lanes;
  }
}

Instruction const& instruction_at(Block const& block, int32_t pc) {
  return block.grid->code->instructions[pc];
}

std::string describe(Block const& block) {
  Code const& code = *block.grid->code;
  std::ostringstream text;
  text << "block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << ")";
  for (Warp const& warp : block.warps) {
    uint32_t left = warp.live;
    while (left != 0) {
      int const leader = __builtin_ctz(left);
      uint32_t same = 0;
      each_lane(left,
                [&](int lane) { same |= uint32_t{warp.pc[lane] == warp.pc[leader]} << lane; });
      left &= ~same;
      Instruction const& i = code.instructions[warp.pc[leader]];
      text << "\n  warp " << warp.index << ", lanes " << std::hex << same << std::dec
           << ": PTX line " << i.line << ", " << code.opcodes[warp.pc[leader]] << ", operands";
      for (size_t k = 0; k < std::min<size_t>(i.at.size(), 4); ++k) {
        text << " " << static_cast<int64_t>(warp.registers[int64_t{i.at[k]} * kLanes + leader]);
      }
    }
  }
  return text.str();
}

}  // namespace emulator
