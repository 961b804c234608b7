// Host side of the Hopper kernels: from a problem to a launch, and the registry row of a kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <variant>

#include "sparse_fmha/host/tensor_map.h"
#include "sparse_fmha/registry.h"
#include "sparse_fmha/sm90/kernel.h"

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

// Heads go in equal groups. Measured at 4k to 32k: 16 heads where the tiles differ in weight (fewer
// leave blocks idle behind the last group's heaviest tiles, more evict each other's keys from the
// L2 cache), 4 where they do not.
template <class Mechanism>
Scheduler make_scheduler(FmhaProblem const& p, int32_t q_tiles, int32_t* counter) {
  int32_t const instances = p.heads_q * p.batch;
  int32_t const largest = std::is_same_v<Mechanism, Dense> ? 4 : 16;
  int32_t const groups = ceil_div(instances, largest);
  return {counter, q_tiles * instances, q_tiles, p.heads_q, instances, ceil_div(instances, groups)};
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline void check_compute_capability() {
  int const major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  int const minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0) {
    throw std::runtime_error("sparse_fmha: the GPU has compute capability " +
                             std::to_string(major) + "." + std::to_string(minor) +
                             "; the compiled kernels need 9.0");
  }
}

template <class Traits, class Mechanism>
void launch(FmhaProblem const& p, ExecutionContext const& context) {
  check_compute_capability();
  auto const stream = static_cast<cudaStream_t>(context.stream);
  auto const& sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  TileShape const shape = Traits::tile_shape();
  int32_t const q_tiles = Mechanism::num_query_tiles(sparsity, shape);
  int64_t const num_tiles = static_cast<int64_t>(q_tiles) * p.heads_q * p.batch;
  if (num_tiles > INT32_MAX / 2) {
    throw std::runtime_error("sparse_fmha: batch * heads * query tiles is " +
                             std::to_string(num_tiles) + ", above 2^30");
  }
  int64_t const len_q = volume(p.grid_q);
  int64_t const len_kv = volume(p.grid_kv);
  auto map = [&](TensorView const& view, int64_t length, int heads, int rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, p.head_dim, rows);
  };
  auto* counter = static_cast<int32_t*>(context.workspace);

  KernelParams<Mechanism> params;
  params.q = map(p.q, len_q, p.heads_q, 64);
  params.k = map(p.k, len_kv, p.heads_kv, Traits::kTileK);
  params.v = map(p.v, len_kv, p.heads_kv, Traits::kTileK);
  params.out = map(p.out, len_q, p.heads_q, 64);
  params.lse = p.lse;
  params.sparsity = sparsity;
  params.len_q = static_cast<int32_t>(len_q);
  params.heads_q = p.heads_q;
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.scheduler = make_scheduler<Mechanism>(p, q_tiles, counter);

  check_cuda(cudaMemsetAsync(counter, 0, sizeof(int32_t), stream), "clearing the tile counter");
  auto* kernel = &attention_kernel<Traits, Mechanism>;
  constexpr int kSmemBytes = sizeof(SharedStorage<Traits>);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
             "raising the shared-memory limit");
  int const blocks =
      std::min(params.scheduler.num_tiles, device_attribute(cudaDevAttrMultiProcessorCount));
  kernel<<<blocks, Traits::kThreads, kSmemBytes, stream>>>(params);
  check_cuda(cudaGetLastError(), "launching the attention kernel");
}

template <class Mechanism, class Element, int HeadDim, int TileQ, int TileK, int Stages,
          Schedule kSchedule>
KernelRow kernel_row(char const* name) {
  using Traits = KernelTraits<Element, HeadDim, TileQ, TileK, Stages, kSchedule>;
  static_assert(sizeof(SharedStorage<Traits>) <= Traits::kSmemLimit,
                "the tiles and stages do not fit the shared memory of a Hopper block");
  KernelRow row;
  row.info.key = {Arch::kSm90, data_type(Element{}), HeadDim, mechanism_index<Mechanism>()};
  row.info.name = name;
  row.info.mechanism = Mechanism::kName;
  row.info.tile_q = TileQ;
  row.info.tile_k = TileK;
  row.info.stages = Stages;
  row.info.threads = Traits::kThreads;
  row.info.smem_bytes = sizeof(SharedStorage<Traits>);
  row.launch = &launch<Traits, Mechanism>;
  return row;
}

}  // namespace sparse_fmha::sm90
