// What every row of the registry says of its kernel.
#pragma once

#include <cutlass/numeric_types.h>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::device {

inline DataType data_type(cutlass::half_t) { return DataType::kFloat16; }
inline DataType data_type(cutlass::bfloat16_t) { return DataType::kBFloat16; }

// The row of a kernel, still without its launch, threads and shared memory. Config: its row of a
// kernel list. Served: the mechanism that the row is for, where the kernel serves several.
template <class Config, class Served = typename Config::Mechanism>
KernelRow describe_row(char const* name, Arch arch, Pass pass) {
  static_assert(is_mechanism<typename Config::Mechanism>());
  KernelRow row;
  row.info.key = {arch,
                  pass,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  Config::kValueDim,
                  mechanism_index<Served>(),
                  /*skips=*/false};
  row.info.name = name;
  row.info.mechanism = Served::kName;
  row.info.tile_q = Config::kTileQ;
  row.info.tile_k = Config::kTileK;
  row.info.stages = Config::kStages;
  return row;
}

}  // namespace sparse_fmha::device
