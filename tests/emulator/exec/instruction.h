// A decoded instruction: a function and the registers that it works on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "launch.h"

namespace emulator {

struct Warp;
struct Instruction;

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

enum class Outcome : uint8_t {
  kNext,      // the lanes go on with the next instruction
  kBlocked,   // the lanes stay, and other lanes and warps run
  kYielded,   // kNext, and other lanes and warps run
  kBranched,  // the function has set the lanes' program counters
  kExited,    // the lanes have ended
};

// Runs an instruction for some lanes of a warp.
using Handler = Outcome (*)(Warp&, Instruction const&, uint32_t lanes);

// What an instruction needs beyond the fields below.
struct Details {
  virtual ~Details() = default;
};

struct Instruction {
  Handler run = nullptr;
  std::vector<int32_t> at;  // registers, in the operands' order; vectors in place
  int32_t guard = -1;       // a predicate register
  bool guard_negated = false;
  int32_t target = -1;  // of a branch
  int32_t line = 0;
  int64_t offset = 0;        // of an address
  uint64_t value = 0;        // an immediate
  uint32_t bytes = 0;        // of an element
  uint32_t count = 0;        // elements
  bool moves_lanes = false;  // the function reads and sets program counters
  bool writes_late = false;  // wgmma: its first `count` registers may await another one's products
  std::shared_ptr<Details const> details;
};

}  // namespace emulator
