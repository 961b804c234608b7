// The geometry of each mechanism.
#pragma once

#include "sparse_fmha/device/geometry_on.h"
#include "sparse_fmha/sm90/geometry/grid/launch.h"
#include "sparse_fmha/sm90/geometry/lists/launch.h"
#include "sparse_fmha/sm90/geometry/packed/launch.h"
#include "sparse_fmha/sm90/geometry/sequence/launch.h"
#include "sparse_fmha/sm90/geometry/stripes/launch.h"

namespace sparse_fmha::sm90 {

template <class Mechanism>
struct GeometryOf;
template <>
struct GeometryOf<Dense> : On<Sequence> {};
template <>
struct GeometryOf<Causal> : On<Sequence> {};
template <>
struct GeometryOf<DenseOrCausal> : On<Sequence> {};
template <>
struct GeometryOf<PackedSequences> : On<Packed> {};
template <>
struct GeometryOf<Neighborhood> : On<Grid> {};
template <>
struct GeometryOf<DilatedNeighborhood> : On<Grid> {};
template <>
struct GeometryOf<BlockSparse> : On<Lists> {};
template <>
struct GeometryOf<Stripe> : On<Stripes> {};

}  // namespace sparse_fmha::sm90
