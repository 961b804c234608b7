// The epilogue of the backward kernels: from a warp's sums to global memory, through shared memory,
// so that stores are whole 16-byte chunks.
#pragma once

#include "sparse_fmha/sm80/backward/products.h"

namespace sparse_fmha::sm80 {

// Each warp stores its own rows and columns. `tile` has room for the block's rows and is free.
// row_of(r) is the index of row r in `to`, whose rows have head_dim elements, or negative.
template <class Traits, class RowOf>
__device__ __forceinline__ void store_sums(Sums<Traits::kBlocks, Traits::kWarpDim> const& sums,
                                           float scale, typename Traits::Element* tile,
                                           WarpPart<Traits> const& warp, void* to, int32_t head_dim,
                                           RowOf const& row_of) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kWarpDim / 8;
  int const first_chunk = warp.columns * kChunks;
  CUTE_UNROLL
  for (int b = 0; b < Traits::kBlocks; ++b) {
    CUTE_UNROLL
    for (int n = 0; n < kChunks; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        auto const& from = sums.at[b][n];
        Element* const at =
            tile + swizzled<Traits::kRowDim>({warp.thread_row(b) + 8 * r, first_chunk + n});
        *reinterpret_cast<uint32_t*>(at + warp.lane % 4 * 2) =
            rounded<Element>(scale * from[2 * r], scale * from[2 * r + 1]);
      }
    }
  }
  __syncwarp();
  CUTE_NO_UNROLL
  for (int i = warp.lane; i < Traits::kWarpRows * kChunks; i += 32) {
    int const row = warp.first_row() + i / kChunks;
    int const chunk = first_chunk + i % kChunks;
    int64_t const index = row_of(row);
    if (index >= 0 && chunk * 8 < head_dim) {
      *reinterpret_cast<uint4*>(static_cast<Element*>(to) + index * head_dim + chunk * 8) =
          *reinterpret_cast<uint4 const*>(tile + swizzled<Traits::kRowDim>({row, chunk}));
    }
  }
}

}  // namespace sparse_fmha::sm80
