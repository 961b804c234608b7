// The geometry of each mechanism in the dK/dV kernel.
#pragma once

#include "sparse_fmha/device/geometry_on.h"
#include "sparse_fmha/sm90/geometry/grid/launch_keys.h"
#include "sparse_fmha/sm90/geometry/lists/launch_keys.h"
#include "sparse_fmha/sm90/geometry/sequence/launch_keys.h"

namespace sparse_fmha::sm90 {

template <class Mechanism>
struct KeysOf;
template <>
struct KeysOf<Dense> : On<SequenceKeys> {};
template <>
struct KeysOf<Causal> : On<SequenceKeys> {};
template <>
struct KeysOf<Neighborhood> : On<GridKeys> {};
template <>
struct KeysOf<BlockSparse> : On<ListKeys> {};
template <>
struct KeysOf<Stripe> : On<ListKeys> {};

}  // namespace sparse_fmha::sm90
