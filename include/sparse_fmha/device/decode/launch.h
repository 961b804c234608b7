// Host code: what the launches of decode kernels have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/decode/merge.h"
#include "sparse_fmha/planning/decode_sizes.h"

namespace sparse_fmha::device {

// Rows are copied in chunks of 16 bytes.
inline void check_copies(char const* name, TensorView const& t) {
  for (int64_t stride : {t.batch_stride, t.axis_stride[kGridAxes - 1], t.head_stride}) {
    if (stride % 8 != 0 || reinterpret_cast<uintptr_t>(t.data) % 16 != 0) {
      throw std::runtime_error(std::string("sparse_fmha: ") + name +
                               " must start, and have strides, at multiples of 16 bytes on a "
                               "GPU; copy it");
    }
  }
}

inline void add_scale(DecodeParams& params, double scale, double softcap) {
  params.negate = scale < 0;
  // Zero would turn the -inf of a masked score into NaN.
  double const scale_log2 = std::max(std::abs(scale) * M_LOG2E, 1e-30);
  params.scale_log2 = static_cast<float>(scale_log2);
  params.tanh_scale = 0.f;
  if (softcap != 0) {
    // A cap far above all scores changes nothing. Limits keep both factors normal numbers.
    double const most = std::min(scale_log2 * 1e37, 1e37);
    double const cap_log2 = std::clamp(softcap * M_LOG2E, 1e-30, most);
    params.scale_log2 = static_cast<float>(cap_log2);
    params.tanh_scale = static_cast<float>(std::min(scale_log2 / cap_log2, 1e30));
  }
}

// Fills in what does not depend on the kernel.
inline void describe_decode(DecodeParams& params, FmhaProblem const& p) {
  check_copies("q", p.q);
  check_copies("k_cache", p.k);
  check_copies("v_cache", p.v);
  DecodeKeys const& keys = *p.decode;
  params.keys = keys;
  params.q = p.q;
  params.k = p.k;
  params.v = p.v;
  params.out = p.out;
  params.lse = p.lse;
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts),
                 p.heads_kv};
  params.heads_kv = p.heads_kv;
  params.head_dim = p.head_dim;
  params.row_groups = keys.row_groups();
  params.rows = std::min(DecodeKeys::kRows, keys.by_query ? keys.group : keys.len_q * keys.group);
  int64_t const groups = int64_t{p.batch} * p.heads_kv * params.row_groups;
  if (groups * params.rows > INT32_MAX) {
    throw std::runtime_error(
        "sparse_fmha: q must have at most 2^31 - 1 rows in groups of 64 of a KV head");
  }
  params.groups = static_cast<int32_t>(groups);
  add_scale(params, p.scale, p.softcap);
}

// Takes device memory for the plan, for the partial results of `workers` and, if workers take parts
// one by one, for their counter. Sizes follow from shapes alone.
inline void take_decode_memory(DecodeParams& params, int64_t workers,
                               ExecutionContext const& context) {
  DecodeKeys const& keys = params.keys;
  int64_t const groups = params.groups;
  auto const units = [&](int64_t size) { return groups * ceil_div_64(most_slots(keys), size); };
  if (units(DecodeKeys::kTile) > INT32_MAX / 2) {
    throw std::runtime_error(
        "sparse_fmha: the caches of all requests and KV heads must hold at most 2^30 tiles "
        "of 64 keys");
  }
  // All requests may be of any length; there are never more parts than for the longest.
  int64_t const most_parts = keys.split > 0
                                 ? units(keys.split)
                                 : DecodeParts::most_count(units(DecodeKeys::kTile), workers,
                                                           DecodeParts::short_parts(params.rows));
  auto take = [&](auto*& to, int64_t count) {
    to = static_cast<std::remove_reference_t<decltype(to)>>(
        context.memory->allocate(count * sizeof(*to)));
  };
  take(params.plan.first, groups + 1);
  take(params.plan.tiles, groups);
  params.merges_by_group = groups <= most_parts;
  params.most_merges = static_cast<int32_t>(std::min(groups, most_parts));
  take(params.merges, params.most_merges);
  take(params.partial, DecodeParts::places(most_parts) * params.rows * params.head_dim);
  take(params.sums, DecodeParts::places(most_parts) * params.rows);
  if (most_parts > workers) {
    take(params.next, 1);
    check_cuda(
        cudaMemsetAsync(params.next, 0, sizeof(int32_t), static_cast<cudaStream_t>(context.stream)),
        "clearing the counter");
  }
}

// kByItself: the kernel begins while the one before it runs, and waits for it by itself.
enum class LaunchOrder { kAfter, kByItself };

template <class... Params, class... Args>
void launch_kernel(void (*kernel)(Params...), dim3 grid, int threads, size_t smem,
                   cudaStream_t stream, LaunchOrder order, char const* what, Args const&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = order == LaunchOrder::kByItself ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// Launches a kernel of decode attention between its plan, if many groups need one, and its merge.
// `order`: of kernels of which the one before is a kernel of the same call.
template <class Element, class Params>
void launch_decode(void (*kernel)(Params), uint32_t blocks, int threads, size_t smem,
                   LaunchOrder order, Params const& params, cudaStream_t stream) {
  constexpr int32_t kFewMerges = 128;
  constexpr int32_t kMostMergeBlocks = 4096;
  if (params.planned) {
    launch_kernel(decode_plan_kernel<Params>, {1}, kPlanThreads, 0, stream, LaunchOrder::kAfter,
                  "launching the plan of decode attention", params);
  }
  launch_kernel(kernel, {blocks}, threads, smem, stream,
                params.planned ? order : LaunchOrder::kAfter, "launching the decode kernel",
                params);
  auto const merge = [&](auto* merges, int warps) {
    auto const entries = static_cast<uint32_t>(std::min(params.most_merges, kMostMergeBlocks));
    launch_kernel(merges, {entries, static_cast<uint32_t>(params.rows)}, warps * 32, 0, stream,
                  order, "launching the merge of decode attention", params);
  };
  // Few groups have many pieces each.
  if (params.most_merges <= kFewMerges) {
    merge(&decode_merge_kernel<Element, 16, Params>, 16);
  } else {
    merge(&decode_merge_kernel<Element, 4, Params>, 4);
  }
}

}  // namespace sparse_fmha::device
