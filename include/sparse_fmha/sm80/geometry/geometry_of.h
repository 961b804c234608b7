// The geometry of each mechanism.
#pragma once

#include "sparse_fmha/device/geometry_on.h"
#include "sparse_fmha/sm80/geometry/grid.h"
#include "sparse_fmha/sm80/geometry/lists.h"
#include "sparse_fmha/sm80/geometry/sequence.h"
#include "sparse_fmha/sm80/geometry/stripes.h"

namespace sparse_fmha::sm80 {

template <class Mechanism>
struct GeometryOf;
template <>
struct GeometryOf<Dense> : On<Sequence> {};
template <>
struct GeometryOf<Causal> : On<Sequence> {};
template <>
struct GeometryOf<Neighborhood> : On<Grid> {};
template <>
struct GeometryOf<BlockSparse> : On<Lists> {};
template <>
struct GeometryOf<Stripe> : On<Stripes> {};

}  // namespace sparse_fmha::sm80
