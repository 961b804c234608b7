// Host code: boxes of a grid and views of the tensors that they are copied from.
#pragma once

#include <algorithm>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/box_mask.h"

namespace sparse_fmha::sm90 {

using device::BoxBits;

// The tokens {first + i * step} of a tensor, per axis.
inline TensorView interleaved(TensorView view, Coord const& first, Coord const& step,
                              int bytes = 2) {
  for (int axis = 0; axis < kGridAxes; ++axis) {
    view.data = static_cast<char*>(view.data) + first[axis] * view.axis_stride[axis] * bytes;
    view.axis_stride[axis] *= step[axis];
  }
  return view;
}

// log2 of the extents, which are powers of two.
inline BoxBits box_bits(Coord const& extent) {
  return {log2_floor(extent[1]), log2_floor(extent[2])};
}

// The extents of 64 consecutive rows of a box that start at a multiple of 64.
inline Coord warpgroup_box(Coord const& extent) {
  int32_t const x = std::min(extent[2], 64);
  int32_t const y = std::min(extent[1], 64 / x);
  return {64 / x / y, y, x};
}

}  // namespace sparse_fmha::sm90
