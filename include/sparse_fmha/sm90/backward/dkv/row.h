// The registry row of a kernel of dK and dV, and of dQ if it computes that too.
#pragma once

#include "sparse_fmha/sm90/common/data_type.h"
#include "sparse_fmha/sm90/geometry/keys_of.h"

namespace sparse_fmha::sm90 {

template <class Config, class Traits>
using KeyGeometry =
    typename KeysOf<typename Config::Mechanism>::template Type<Traits, typename Config::Mechanism>;

template <class Config, class Traits>
KernelRow dkv_row(Pass pass, char const* name) {
  using Mechanism = typename Config::Mechanism;
  using Storage = StorageOf<Traits, KeyGeometry<Config, Traits>>;
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row;
  row.info.key = {Arch::kSm90,
                  pass,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  mechanism_index<Mechanism>(),
                  /*skips=*/false,
                  Traits::kKeyBias};
  row.info.name = name;
  row.info.mechanism = Mechanism::kName;
  row.info.tile_q = Traits::kTileQ;
  row.info.tile_k = Traits::kTileK;
  row.info.stages = Traits::kStages;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(Storage);
  return row;
}

}  // namespace sparse_fmha::sm90
