// Which order of a neighborhood's query tiles keeps the keys of those at work in the L2 cache.
#pragma once

#include "sparse_fmha/mechanisms/neighborhood.h"
#include "sparse_fmha/planning/tile_order.h"

namespace sparse_fmha {

// For `blocks` query tiles of a head at a time. Row-major where another order reads no fewer keys,
// and where an axis is causal or dilated: there the first axis decides what is heavy, or near.
TileOrder choose_order(Neighborhood::Params const& params, TileShape const& shape, int32_t blocks);

}  // namespace sparse_fmha
