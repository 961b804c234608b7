// The registry row of a forward kernel.
#pragma once

#include "sparse_fmha/sm80/geometry/geometry_of.h"

namespace sparse_fmha::sm80 {

inline DataType data_type(cutlass::half_t) { return DataType::kFloat16; }
inline DataType data_type(cutlass::bfloat16_t) { return DataType::kBFloat16; }

template <class Config>
KernelRow kernel_row(char const* name) {
  using Traits = KernelTraits<Config>;
  using Mechanism = typename Config::Mechanism;
  using Geometry = typename GeometryOf<Mechanism>::template Type<Traits, Mechanism>;
  static_assert(is_mechanism<Mechanism>());
  KernelRow row;
  row.info.key = {Config::kArch,
                  Pass::kForward,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  mechanism_index<Mechanism>(),
                  Traits::kVotes};
  row.info.name = name;
  row.info.mechanism = Mechanism::kName;
  row.info.tile_q = Traits::kTileQ;
  row.info.tile_k = Traits::kTileK;
  row.info.stages = Traits::kStages;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(SharedStorage<Traits, Geometry>);
  row.launch = &Geometry::launch;
  return row;
}

}  // namespace sparse_fmha::sm80
