// Passes as they are called for one work item, with the unit that multiplies.
#pragma once

#include "sparse_fmha/cpu/multiply.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

#if defined(SPARSE_FMHA_TILE_REGISTERS)
using ProductUnit = TilesInUse;
#else
struct ProductUnit {};
#endif

// Pass::run while its products have their unit. Tiles is the shape or the plan of its tiles.
template <class Pass, class Problem, class Tiles>
void run_in_unit(Problem const& problem, void const* params, Tiles const& tiles, int64_t item,
                 void* scratch) {
  [[maybe_unused]] ProductUnit const unit{};
  Pass::run(problem, params, tiles, item, scratch);
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
