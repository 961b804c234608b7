// Boxes of a dilation class, for tensor maps that have a step of the dilation between their
// elements, so that one map reaches the classes of every head and batch entry.
//
// On each axis a class has one of two lengths, and a map clips at one. So the positions of the
// shorter classes are counted from 1: position -1 of theirs, which no box contains, is element 0,
// and both kinds end with the same element. The last axis of the map is an offset in units that
// divide all strides. It leads to the class, the head and the batch entry.
#pragma once

#include <cstdint>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

// A class in the maps of all tensors.
struct ClassOrigin {
  Coord token;     // of element 0, from where maps begin
  Coord position;  // element of the class' first position
};

SPARSE_FMHA_HD ClassOrigin class_origin(Neighborhood::Params const& p, Coord const& residue) {
  ClassOrigin origin{};
  for (int axis = 0; axis < kGridAxes; ++axis) {
    int32_t const rest = p.grid[axis] % p.dilation[axis];
    bool const longer = residue[axis] < rest;
    origin.token[axis] = residue[axis] + (longer ? p.dilation[axis] : 0);
    origin.position[axis] = rest != 0 && !longer;
  }
  return origin;
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

// The map of one tensor.
struct ClassMap {
  int64_t unit;    // elements to a step of the last axis
  int64_t extent;  // of the last axis
  int64_t before;  // elements from where the map begins to the tensor
  ClassUnits units;
  bool fits;  // its coordinates are 32-bit numbers; only then are `units` right
};

ClassMap class_map(TensorView const& view, Neighborhood::Params const& params, int32_t heads,
                   int32_t batch);

// Whether the boxes of q, k, v and out are found in this way: the strides of the copy engine do not
// reach the dilation, and coordinates fit.
bool takes_class_boxes(FmhaProblem const& problem);

}  // namespace sparse_fmha
