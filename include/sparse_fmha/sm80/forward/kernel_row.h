// The registry row of a kernel of any pass.
#pragma once

#include "sparse_fmha/device/kernel_row.h"

namespace sparse_fmha::sm80 {

// Geometries: GeometryOf or KeysOf, the table of the pass.
template <class Traits, template <class Mechanism> class Geometries>
KernelRow row_of(char const* name) {
  using Config = typename Traits::Config;
  using Mechanism = typename Config::Mechanism;
  using Geometry = typename Geometries<Mechanism>::template Type<Traits, Mechanism>;
  KernelRow row = device::describe_row<Config>(name, Config::kArch, Traits::kPass);
  row.info.key.skips = Traits::kVotes;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(typename Traits::template Storage<Geometry>);
  row.launch = &Geometry::launch;
  return row;
}

}  // namespace sparse_fmha::sm80
