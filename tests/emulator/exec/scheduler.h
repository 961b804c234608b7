#pragma once

#include "program.h"
#include "warp.h"

namespace emulator {

// Runs lanes of a warp until none can go on, or `quantum` instructions have been run. Throws Error,
// which names the instruction.
void run_warp(Warp& warp, uint32_t quantum);

// Where each warp of a block is.
std::string describe(Block const& block);

}  // namespace emulator
