// The geometry of each mechanism in the dK/dV kernel.
#pragma once

#include "sparse_fmha/sm90/geometry/grid/launch_keys.h"
#include "sparse_fmha/sm90/geometry/lists/launch_keys.h"
#include "sparse_fmha/sm90/geometry/sequence/launch_keys.h"

namespace sparse_fmha::sm90 {

template <template <class Traits, class Mechanism> class Geometry>
struct KeysOn {
  template <class Traits, class Mechanism>
  using Type = Geometry<Traits, Mechanism>;
};

template <class Mechanism>
struct KeysOf;
template <>
struct KeysOf<Dense> : KeysOn<SequenceKeys> {};
template <>
struct KeysOf<Causal> : KeysOn<SequenceKeys> {};
template <>
struct KeysOf<Neighborhood> : KeysOn<GridKeys> {};
template <>
struct KeysOf<BlockSparse> : KeysOn<ListKeys> {};
template <>
struct KeysOf<Stripe> : KeysOn<ListKeys> {};

}  // namespace sparse_fmha::sm90
