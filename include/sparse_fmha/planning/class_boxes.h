// Boxes of a dilation class, for tensor maps that have a step of the dilation between their
// elements, so that one map reaches the classes of every head and batch entry.
//
// On each axis a class has one of two lengths, and a map clips at one: there is a map for each of
// the kinds of classes. The last axis of a map is an offset in units that divide all strides. It
// leads to the class, the head and the batch entry.
//
// One map for all kinds, in which the shorter classes begin a dilation before their first token,
// clips alike, and no box has an element before the tensor. But on a GPU copies by maps that begin
// in memory that is not there fault.
#pragma once

#include <cstdint>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

constexpr int kClassKinds = 8;  // bit `axis` is set in those with the shorter length

SPARSE_FMHA_HD int32_t class_kind(Neighborhood::Params const& p, Coord const& residue) {
  int32_t kind = 0;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    int32_t const rest = p.grid[axis] % p.dilation[axis];
    kind |= (rest != 0 && residue[axis] >= rest) << axis;
  }
  return kind;
}

// Positions on each axis.
inline Coord class_length(Neighborhood::Params const& p, int32_t kind) {
  Coord length{};
  for (int axis = 0; axis < kGridAxes; ++axis) {
    length[axis] = ceil_div(p.grid[axis], p.dilation[axis]) - (kind >> axis & 1);
  }
  return length;
}

// Strides of one tensor on the last axis of its map.
struct ClassUnits {
  int32_t batch;
  int32_t head;
  int32_t axis[kGridAxes];

  SPARSE_FMHA_HD int32_t offset(int32_t b, int32_t h, Coord const& token) const {
    return b * batch + h * head + token[0] * axis[0] + token[1] * axis[1] + token[2] * axis[2];
  }
};

// The last axis of the maps of one tensor.
struct ClassMap {
  int64_t unit;    // elements to a step of the last axis
  int64_t extent;  // of the last axis
  ClassUnits units;
  bool fits;  // its coordinates are 32-bit numbers; only then are `units` right
};

ClassMap class_map(TensorView const& view, Neighborhood::Params const& params, int32_t heads,
                   int32_t batch);

// Whether the boxes of q, k, v and out are found in this way: the strides of the copy engine do not
// reach the dilation, and coordinates fit.
bool takes_class_boxes(FmhaProblem const& problem);

}  // namespace sparse_fmha
