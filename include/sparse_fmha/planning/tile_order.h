// The order in which the tiles of a grid are taken.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha {

// One axis is the slowest; the other two follow in their own order.
struct TileOrder {
  int32_t others;  // tiles per position on the slowest axis
  int32_t inner;   // of these, tiles that differ only on later axes

  // The row-major index of the i-th tile.
  SPARSE_FMHA_HD int32_t at(int32_t i, int32_t num_tiles) const {
    int32_t const slowest = i / others;
    int32_t const rest = i % others;
    return (rest / inner * (num_tiles / others) + slowest) * inner + rest % inner;
  }
};

}  // namespace sparse_fmha
