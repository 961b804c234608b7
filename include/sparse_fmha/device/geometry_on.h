// An entry of the tables that say which geometry a mechanism has.
#pragma once

namespace sparse_fmha::device {

template <template <class Traits, class Mechanism> class Geometry>
struct On {
  template <class Traits, class Mechanism>
  using Type = Geometry<Traits, Mechanism>;
};

}  // namespace sparse_fmha::device
