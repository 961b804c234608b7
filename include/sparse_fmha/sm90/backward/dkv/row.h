// The registry row of a kernel of dK and dV, and of dQ if it computes that too.
#pragma once

#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm90/geometry/keys_of.h"

namespace sparse_fmha::sm90 {

template <class Config, class Traits>
using KeyGeometry =
    typename KeysOf<typename Config::Mechanism>::template Type<Traits, typename Config::Mechanism>;

template <class Config, class Traits>
KernelRow dkv_row(Pass pass, char const* name) {
  using Storage = StorageOf<Traits, KeyGeometry<Config, Traits>>;
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row = device::describe_row<Config>(name, Arch::kSm90, pass);
  row.info.key.key_bias = Traits::kKeyBias;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(Storage);
  return row;
}

}  // namespace sparse_fmha::sm90
