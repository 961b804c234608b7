// Tensor maps of boxes that end with a sequence, in a tensor [tokens, heads, D] of many sequences.
//
// A map clips boxes at the end of a dimension, which is the same for all boxes. Here dimension x
// (the rows of a box) ends at kEnd, and two more, y and z, move its origin: y by whole rows, and z,
// always at kEnd, by -kEnd rows, since its stride is -1 row modulo 2^64 / kEnd and addresses wrap
// around at 2^64. A sequence of n rows from token t has row r at x = kEnd - n + r, y = t + n, whose
// address is that of token t + r, and rows from n on are outside.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Rows [row, row + the box) of `head` in a sequence.
struct RaggedBox {
  static constexpr int32_t kEnd = 1 << 30;  // no sequence is longer
  int32_t x;
  int32_t y;
  int32_t head;

  RaggedBox() = default;
  // begin: token of the sequence's first row.
  __device__ __forceinline__ RaggedBox(int32_t begin, int32_t length, int32_t row, int32_t head)
      : x(kEnd - length + row), y(begin + length), head(head) {}
};

// Maps (D, x, H, y, z). view: [tokens, heads, D], the tokens on its last axis.
inline CUtensorMap ragged_map(TensorView const& view, DataType dtype, int64_t heads,
                              int64_t head_dim, uint32_t rows) {
  constexpr int64_t kAny = INT32_MAX;
  constexpr int64_t kTurn = (int64_t{1} << 34) / 2;  // 2^64 bytes / kEnd, in elements
  int64_t const stride = view.axis_stride[kGridAxes - 1];
  return make_tensor_map<4>(
      view.data, dtype, head_dim,
      {MapAxis{RaggedBox::kEnd, stride, rows}, MapAxis{heads, view.head_stride},
       MapAxis{kAny, stride}, MapAxis{kAny, kTurn - stride}});
}

template <int kHeadDim, class Element>
__device__ __forceinline__ void load_ragged(CUtensorMap const& map, FullBarrier& barrier,
                                            Element* to, int tile_rows,
                                            cute::TMA::CacheHintSm90 hint, RaggedBox const& box) {
  load_box<kHeadDim>(map, barrier, to, tile_rows, hint, box.x, box.head, box.y,
                     int32_t{RaggedBox::kEnd});
}

template <int kHeadDim, int kTileRows, class Element>
__device__ __forceinline__ void store_ragged(CUtensorMap const& map, Element const* from,
                                             RaggedBox const& box) {
  CUTE_UNROLL
  for (int d = 0; d < kHeadDim; d += 64) {
    cute::SM90_TMA_STORE_5D::copy(&map, from + d * kTileRows, d, box.x, box.head, box.y,
                                  int32_t{RaggedBox::kEnd});
  }
}

}  // namespace sparse_fmha::sm90
