// The geometry of each mechanism in the dK/dV kernel.
#pragma once

#include "sparse_fmha/sm80/geometry/geometry_of.h"
#include "sparse_fmha/sm80/geometry/grid_keys.h"
#include "sparse_fmha/sm80/geometry/list_keys.h"
#include "sparse_fmha/sm80/geometry/sequence_keys.h"

namespace sparse_fmha::sm80 {

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

}  // namespace sparse_fmha::sm80
