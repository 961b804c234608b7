// Chooses the order of a neighborhood's query tiles that keeps the keys of concurrent tiles in the
// L2 cache.
#pragma once

#include "sparse_fmha/mechanisms/neighborhood.h"
#include "sparse_fmha/planning/tile_order.h"

namespace sparse_fmha {

// For `blocks` query tiles of a head at a time. Row-major if no other order reads fewer keys, or if
// an axis is causal or dilated: then the first axis decides which tiles are heavy, or which are
// near.
TileOrder choose_order(Neighborhood::Params const& params, TileShape const& shape, int32_t blocks);

}  // namespace sparse_fmha
