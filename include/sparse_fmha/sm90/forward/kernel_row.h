// The registry row of a kernel that walks the key tiles of a query tile.
#pragma once

#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm90/geometry/geometry_of.h"

namespace sparse_fmha::sm90 {

// Traits: the pass's traits for the Config. Served: the mechanism that the row is for, where the
// kernel serves several.
template <class Config, class Traits, class Served = typename Config::Mechanism>
KernelRow row_of(char const* name) {
  using Mechanism = typename Config::Mechanism;
  using Geometry = typename GeometryOf<Mechanism>::template Type<Traits, Mechanism>;
  using Storage = SharedStorage<Traits, Geometry>;
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row = device::describe_row<Config, Served>(name, Arch::kSm90, Traits::kPass);
  row.info.key.skips = Traits::kVotes;
  row.info.key.key_bias = Traits::kKeyBias;
  row.info.key.packed = std::is_same_v<Mechanism, PackedSequences>;
  row.info.key.dilated = std::is_same_v<Mechanism, DilatedNeighborhood>;
  row.info.blocks = Traits::kBlocks;
  row.info.threads = kBlockThreads<Traits, Geometry>;
  row.info.smem_bytes = sizeof(Storage);
  row.launch = &Geometry::launch;
  return row;
}

}  // namespace sparse_fmha::sm90
