// The two matrix products of a warp of a decode kernel, 16 rows with a tile of keys or values in
// shared memory. Registers of fragments are as in device/mma_tile.h; accumulators as in
// device/accumulator.h.
#pragma once

#include "sparse_fmha/device/mma_products.h"

namespace sparse_fmha::device {

// Four matrices of 8 x 8, each transposed.
__device__ __forceinline__ void load_transposed(void const* row, uint32_t (&to)[4]) {
  cute::SM75_U16x8_LDSM_T::copy(*static_cast<cute::uint128_t const*>(row), to[0], to[1], to[2],
                                to[3]);
}

// scores = queries x keys.
template <class Traits, class Queries, class Scores>
__device__ __forceinline__ void multiply_keys(Queries const& queries,
                                              typename Traits::Element const* keys, Scores& scores,
                                              int lane) {
  cute::clear(scores);
  CUTE_UNROLL
  for (int s = 0; s < Traits::kHeadDim / 16; ++s) {
    uint32_t a[4];
    queries.get(s, lane, a);
    CUTE_UNROLL
    for (int n = 0; n < Traits::kTileK / 16; ++n) {
      uint32_t b[4];  // of the first 8 keys depths from 0 and from 8; then of the last 8
      load_matrices(keys + Traits::place(16 * n + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2),
                    b);
      multiply_16<typename Traits::Element>(scores, 2 * n, a, b);
    }
  }
}

// output += weights x values.
template <class Traits, class Output>
__device__ __forceinline__ void multiply_values(Weights<Traits> const& weights,
                                                typename Traits::Element const* values,
                                                Output& output, int lane) {
  CUTE_UNROLL
  for (int s = 0; s < Traits::kTileK / 16; ++s) {
    CUTE_UNROLL
    for (int n = 0; n < Traits::kHeadDim / 16; ++n) {
      uint32_t b[4];  // of the first 8 columns keys from 0 and from 8; then of the last 8
      load_transposed(values + Traits::place(16 * s + lane % 16, 2 * n + lane / 16), b);
      multiply_16<typename Traits::Element>(output, 2 * n, weights.step[s], b);
    }
  }
}

}  // namespace sparse_fmha::device
