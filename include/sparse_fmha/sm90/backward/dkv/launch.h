// The registry row of a dK/dV kernel.
#pragma once

#include "sparse_fmha/sm90/common/data_type.h"
#include "sparse_fmha/sm90/geometry/keys_of.h"

namespace sparse_fmha::sm90 {

template <class Config>
KernelRow kernel_row(char const* name) {
  using Traits = DkvTraits<Config>;
  using Mechanism = typename Config::Mechanism;
  using Geometry = typename KeysOf<Mechanism>::template Type<Traits, Mechanism>;
  using Storage = DkvStorage<Traits, Geometry>;
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row;
  row.info.key = {
      Arch::kSm90,      Pass::kBackwardDkv,           data_type(typename Config::Element{}),
      Config::kHeadDim, mechanism_index<Mechanism>(),
      /*skips=*/false};
  row.info.name = name;
  row.info.mechanism = Mechanism::kName;
  row.info.tile_q = Traits::kTileQ;
  row.info.tile_k = Traits::kTileK;
  row.info.stages = Traits::kStages;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(Storage);
  row.launch = &Geometry::launch;
  return row;
}

}  // namespace sparse_fmha::sm90
