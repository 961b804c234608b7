// Query tiles of consecutive tokens, for geometries on one axis.
#pragma once

#include "sparse_fmha/core/config.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/kernel_params.h"

namespace sparse_fmha::sm80 {

// Tokens from `first` on of one head.
template <class Element>
struct QueryTokens {
  int64_t out;  // index of token 0 in [B, Lq, Hq]
  int32_t batch;
  int32_t head;
  int32_t first;
  int32_t length;

  template <class Params>
  __device__ __forceinline__ QueryTokens(Params const& params, device::WorkTile const& tile,
                                         int32_t first_token, int32_t len_q)
      : out(int64_t{tile.batch} * len_q * params.heads_q + tile.head),
        batch(tile.batch),
        head(tile.head),
        first(first_token),
        length(len_q) {}

  __device__ __forceinline__ TokenRows<Element> rows(TensorView const& view) const {
    return {head_of<Element>(view, batch, head), view.axis_stride[kGridAxes - 1], first, length};
  }
  template <class Params>
  __device__ __forceinline__ int64_t out_row(Params const& params, int r) const {
    int32_t const token = first + r;
    return token < length ? out + int64_t{token} * params.heads_q : -1;
  }
};

}  // namespace sparse_fmha::sm80
