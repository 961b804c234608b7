// Windows that may exceed their axis or name a dilation without effect, as the rest of the planning
// takes them.
#pragma once

#include <algorithm>

#include "sparse_fmha/mechanisms/neighborhood.h"

namespace sparse_fmha {

// On a causal axis a window may extend past the start of the sequence, where keys end anyway: it is
// clamped to the longest dilation class. A window of 1 is the query's own position whatever the
// dilation, and a dilation of 1 is cheaper.
inline void fit_windows(Neighborhood::Params& p) {
  for (int axis = 0; axis < kGridAxes; ++axis) {
    if (p.causal[axis] != 0) {
      p.window[axis] = std::min(p.window[axis], 1 + (p.grid[axis] - 1) / p.dilation[axis]);
      p.stride[axis] = std::min(p.stride[axis], p.window[axis]);
    }
    p.dilation[axis] = p.window[axis] == 1 ? 1 : p.dilation[axis];
  }
}

}  // namespace sparse_fmha
