// Copies of 64 query rows of a sequence, those of one warpgroup, from and to global memory.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Stores to [B, Lq, Hq, D], starting at `token` and clipped to the tensor. `source` is in a tile of
// `kTileQ` rows.
template <int kHeadDim, int kTileQ, class Element>
__device__ __forceinline__ void store_rows(CUtensorMap const& map, Element const* source, int token,
                                           WorkTile const& tile) {
  CUTE_UNROLL
  for (int d = 0; d < kHeadDim; d += 64) {
    cute::SM90_TMA_STORE_4D::copy(&map, source + d * kTileQ, d, token, tile.head, tile.batch);
  }
}

// Calls body(r, value) for the r-th row of a thread: tokens `first` and `first` + 8, if they exist.
// `values` is [B, Lq, Hq]. The sizes are references, so they are read from the kernel's parameters
// when used.
template <class Value, class Body>
__device__ __forceinline__ void visit_sequence_rows(Value* values, int first, WorkTile const& tile,
                                                    int32_t const& len_q, int32_t const& heads_q,
                                                    Body const& body) {
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    int const token = first + 8 * r;
    if (token < len_q) {
      body(r, values[(int64_t(tile.batch) * len_q + token) * heads_q + tile.head]);
    }
  }
}

}  // namespace sparse_fmha::sm90
