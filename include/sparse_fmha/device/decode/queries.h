// Loads the queries of a piece.
#pragma once

#include "sparse_fmha/device/decode/finish.h"

namespace sparse_fmha::device {

// Puts 64 rows of kHeadDim elements where place(row, column) says, in chunks of eight, with the
// sign of the scale. What the group or the head does not have is zero. Called by 128 threads.
template <int kHeadDim, class Element, class Place>
__device__ __forceinline__ void load_decode_queries(DecodeParams const& params,
                                                    DecodeParams::Group const& at, KeyRange rows,
                                                    Element* to, Place place) {
  uint32_t const sign = params.negate ? 0x80008000u : 0;
  CUTE_NO_UNROLL
  for (int i = threadIdx.x % 128; i < 64 * kHeadDim / 8; i += 128) {
    int const r = i / (kHeadDim / 8);
    int const column = i % (kHeadDim / 8) * 8;
    int32_t const row = rows.begin + r;
    uint4 x = {0, 0, 0, 0};
    if (row < rows.end && column < params.head_dim) {
      DecodeRow const from(params, at, row);
      x = *reinterpret_cast<uint4 const*>(static_cast<Element const*>(params.q.data) +
                                          from.offset(params.q) + column);
      x = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
    }
    *reinterpret_cast<uint4*>(to + place(r, column)) = x;
  }
}

}  // namespace sparse_fmha::device
