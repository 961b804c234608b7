// The registry row of a Hopper kernel.
#pragma once

#include <variant>

#include "sparse_fmha/sm90/geometry/grid/launch.h"
#include "sparse_fmha/sm90/geometry/lists/launch.h"
#include "sparse_fmha/sm90/geometry/sequence/launch.h"
#include "sparse_fmha/sm90/geometry/stripes/launch.h"

namespace sparse_fmha::sm90 {

// The place of a mechanism's parameters among the alternatives of Sparsity.
template <class Mechanism, int Index = 0>
constexpr int mechanism_index() {
  static_assert(Index < std::variant_size_v<Sparsity>, "Sparsity has no such mechanism");
  using Alternative = std::variant_alternative_t<Index, Sparsity>;
  if constexpr (std::is_same_v<typename Mechanism::Params, Alternative>) {
    return Index;
  } else {
    return mechanism_index<Mechanism, Index + 1>();
  }
}

inline DataType data_type(cutlass::half_t) { return DataType::kFloat16; }
inline DataType data_type(cutlass::bfloat16_t) { return DataType::kBFloat16; }

template <class Config>
KernelRow kernel_row(char const* name) {
  using Traits = KernelTraits<Config>;
  using Mechanism = typename Config::Mechanism;
  constexpr bool kByStripes = std::is_same_v<Mechanism, Stripe>;
  using ByLists =
      std::conditional_t<kByStripes, Stripes<Traits, Mechanism>, Lists<Traits, Mechanism>>;
  using OnOneAxis = std::conditional_t<Mechanism::kByLists, ByLists, Sequence<Traits, Mechanism>>;
  using Geometry = std::conditional_t<Mechanism::kOnGrid, Grid<Traits, Mechanism>, OnOneAxis>;
  using Storage = SharedStorage<Traits, Geometry>;
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row;
  row.info.key = {Arch::kSm90,
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
  row.info.threads = kBlockThreads<Traits, Geometry>;
  row.info.smem_bytes = sizeof(Storage);
  if constexpr (Mechanism::kOnGrid) {
    row.launch = &launch_grid<Traits, Mechanism>;
  } else if constexpr (kByStripes) {
    row.launch = &launch_stripes<Traits, Mechanism>;
  } else if constexpr (Mechanism::kByLists) {
    row.launch = &launch_lists<Traits, Mechanism>;
  } else {
    row.launch = &launch_sequence<Traits, Mechanism>;
  }
  return row;
}

}  // namespace sparse_fmha::sm90
