// The registry row of a kernel of any pass.
#pragma once

#include <cutlass/numeric_types.h>

#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::sm80 {

inline DataType data_type(cutlass::half_t) { return DataType::kFloat16; }
inline DataType data_type(cutlass::bfloat16_t) { return DataType::kBFloat16; }

template <class Traits, class Geometry>
KernelRow row_of(char const* name) {
  using Config = typename Traits::Config;
  using Mechanism = typename Config::Mechanism;
  static_assert(is_mechanism<Mechanism>());
  KernelRow row;
  row.info.key = {Config::kArch,
                  Traits::kPass,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  mechanism_index<Mechanism>(),
                  Traits::kVotes,
                  /*key_bias=*/true};
  row.info.name = name;
  row.info.mechanism = Mechanism::kName;
  row.info.tile_q = Traits::kTileQ;
  row.info.tile_k = Traits::kTileK;
  row.info.stages = Traits::kStages;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(typename Traits::template Storage<Geometry>);
  row.launch = &Geometry::launch;
  return row;
}

}  // namespace sparse_fmha::sm80
