// Generalized neighborhood attention on grids of one to three axes.
#pragma once

#include "sparse_fmha/sparsity/contract.h"

namespace sparse_fmha {

struct Neighborhood {
  static constexpr char const* kName = "neighborhood";

  // Axes that the user's grid lacks have length 1, window 1, stride 1, dilation 1, not causal.
  struct Params {
    Coord grid;
    Coord window;
    Coord stride;
    Coord dilation;
    Coord causal;  // 0 or 1 per axis
  };
};

}  // namespace sparse_fmha
