// Branches, ends, and hints that change nothing here.
#include "decoder.h"
#include "warp.h"

namespace emulator {
namespace {

Outcome branch(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp.pc[lane] = i.target; });
  return Outcome::kBranched;
}
bool decode_branch(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = branch;
  return i.target >= 0;
}

Outcome end(Warp& warp, Instruction const&, uint32_t lanes) {
  warp.live &= ~lanes;
  warp.block->live_threads -= static_cast<uint32_t>(__builtin_popcount(lanes));
  ++warp.block->grid->progress;
  return Outcome::kExited;
}
bool decode_end(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = end;
  return true;
}

Outcome trap(Warp&, Instruction const&, uint32_t) { fault("trap"); }
bool decode_trap(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = trap;
  return true;
}

Outcome nothing(Warp&, Instruction const&, uint32_t) { return Outcome::kNext; }
bool decode_nothing(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = nothing;
  return true;
}

Outcome pause(Warp&, Instruction const&, uint32_t) { return Outcome::kYielded; }
bool decode_pause(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = pause;
  return true;
}

// All threads of a warp execute it together.
Outcome aligned(Warp& warp, Instruction const&, uint32_t lanes) {
  return all_here(warp, lanes) ? Outcome::kNext : Outcome::kBlocked;
}
bool decode_aligned(Decoder&, ptx::Statement const&, Instruction& i) {
  i.run = aligned;
  return true;
}

Outcome fence_proxy(Warp& warp, Instruction const&, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    warp.block->order.fenced(warp.index * kLanes + static_cast<uint32_t>(lane));
  });
  return Outcome::kNext;
}
// Memory is always up to date, except for what ProxyOrder checks.
bool decode_fence(Decoder&, ptx::Statement const& statement, Instruction& i) {
  bool const proxy = has_part(statement, "proxy");
  bool const async = has_part(statement, "async") || has_part(statement, "async::generic");
  i.run = proxy && async ? fence_proxy : nothing;
  return !proxy || async || has_part(statement, "tensormap::generic") ||
         has_part(statement, "alias");
}

}  // namespace

void add_control(DecodeTable& table) {
  table["bra"] = decode_branch;
  table["ret"] = decode_end;
  table["exit"] = decode_end;
  table["trap"] = decode_trap;
  table["brkpt"] = decode_nothing;
  table["prefetch"] = decode_nothing;
  table["prefetchu"] = decode_nothing;
  table["applypriority"] = decode_nothing;
  table["discard"] = decode_nothing;
  table["griddepcontrol"] = decode_nothing;  // kernels run one after another
  table["membar"] = decode_fence;
  table["fence"] = decode_fence;
  table["nanosleep"] = decode_pause;
  table["setmaxnreg"] = decode_aligned;
}

}  // namespace emulator
