// The epilogue: from accumulators to global memory, through shared memory, so that stores are whole
// 16-byte chunks.
#pragma once

#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm80/forward/products.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

// A warp stores 16 rows, from row `first` on. `tile` has room for the block's rows and is free.
template <class Traits, class Params, class Geometry, class Work, class RowOutput>
__device__ __forceinline__ void store_tile(Params const& params, Geometry const& geometry,
                                           Work const& work, typename Traits::Element* tile,
                                           int first, RowOutput const& output,
                                           float const (&lse)[kRowsPerThread]) {
  using Element = typename Traits::Element;
  int const lane = threadIdx.x % 32;
  int const row = first + lane / 4;
  CUTE_UNROLL
  for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      auto const pair = rounded<Element>(output(4 * n + 2 * r), output(4 * n + 2 * r + 1));
      Element* const to = tile + chunk_place<Traits::kRowDim>(row + 8 * r, n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pair;
    }
  }
  if (lane % 4 == 0) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int64_t const index = geometry.out_row(work, row + 8 * r);
      if (index >= 0) {
        params.lse[index] = lse[r];
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kLanesOfRow<Traits::kRowDim>;
  constexpr int kRowsAtOnce = 32 / kChunks;
  int const chunk = lane % kChunks;
  CUTE_UNROLL
  for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    int const r = first + i * kRowsAtOnce + lane / kChunks;
    int64_t const index = geometry.out_row(work, r);
    if (index >= 0 && chunk * 8 < params.head_dim) {
      auto* const to = static_cast<Element*>(params.out) + index * params.head_dim + chunk * 8;
      *reinterpret_cast<uint4*>(to) =
          *reinterpret_cast<uint4 const*>(tile + chunk_place<Traits::kRowDim>(r, chunk));
    }
  }
}

}  // namespace sparse_fmha::sm80
