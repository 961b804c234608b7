#pragma once

#include "warp.h"

namespace emulator {

// Completes barriers of all of a block's threads that only waited for warps that have ended.
void warp_ended(Block& block);

}  // namespace emulator
