// The registry row of a decode kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/common/data_type.h"
#include "sparse_fmha/sm90/decode/kernel.h"
#include "sparse_fmha/sm90/decode/merge.h"

namespace sparse_fmha::sm90 {

template <class Config>
struct DecodeLaunch {
  using Traits = DecodeTraits<Config>;
  using Element = typename Config::Element;
  using Storage = DecodeStorage<Traits>;
  static_assert(Config::kTileQ == DecodeKeys::kRows && Config::kTileK == DecodeKeys::kTile,
                "groups of rows and tiles are those of core/decode.h");
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the stages do not fit the shared memory of a Hopper block");

  static void run(FmhaProblem const& p, ExecutionContext const& context) {
    check_copies("q", p.q);
    check_copies("k_cache", p.k);
    check_copies("v_cache", p.v);
    DecodeKeys const& keys = *p.decode;
    DecodeParams params = {};
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
    // Zero would turn the -inf of a masked score into NaN.
    params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
    params.negate = p.scale < 0;
    int const blocks = multiprocessor_count();
    params.box = box_of(keys);
    if (params.box > 0) {
      auto map = [&](TensorView const& of) {
        return make_tensor_map<3>(of.data, rows_of_boxes(p.dtype), p.head_dim,
                                  {MapAxis{p.grid_kv[kGridAxes - 1], of.axis_stride[kGridAxes - 1],
                                           static_cast<uint32_t>(params.box)},
                                   MapAxis{p.heads_kv, of.head_stride},
                                   MapAxis{keys.page > 0 ? keys.pages : p.batch, of.batch_stride}});
      };
      params.k_map = map(p.k);
      params.v_map = map(p.v);
    }
    params.fits_cache = cache_bytes(p) <= kCacheBytes;
    params.cluster = cluster_of(keys, groups, blocks);
    params.lines = params.cluster > 0 ? 1 : lines_of(p, keys, blocks);
    int32_t const planned_groups = params.groups / params.lines;
    params.planned = params.cluster == 0 && planned_groups > kPlannedGroups;
    // Of all groups of a line.
    auto const units = [&](int64_t size) {
      return planned_groups * ceil_div(most_slots(keys), size);
    };
    if (units(DecodeKeys::kTile) * params.lines > INT32_MAX / 2) {
      throw std::runtime_error(
          "sparse_fmha: the caches of all requests and KV heads must hold at most 2^30 tiles "
          "of 64 keys");
    }
    // All requests may be of any length; there are never more parts than for the longest.
    int64_t const workers = int64_t{blocks} * DecodeRoles<Traits>::kWorkers;
    int64_t const most_parts =
        params.lines *
        (keys.split > 0 ? units(keys.split)
                        : DecodeParts::most_count(units(DecodeKeys::kTile), workers / params.lines,
                                                  DecodeParts::short_parts(params.rows)));
    auto const stream = static_cast<cudaStream_t>(context.stream);
    auto take = [&](auto*& to, int64_t count) {
      to = static_cast<std::remove_reference_t<decltype(to)>>(
          context.memory->allocate(count * sizeof(*to)));
    };
    auto* const kernel = &decode_attention_kernel<Traits>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    auto const launch = [&](uint32_t grid, cudaLaunchAttribute const& attribute) {
      launch_kernel(kernel, {grid}, DecodeRoles<Traits>::kThreads, sizeof(Storage), stream,
                    attribute, "launching the decode kernel", params);
    };
    if (params.cluster > 0) {
      launch(static_cast<uint32_t>(groups * params.cluster), of_clusters(params.cluster));
      return;
    }
    if (params.planned) {
      take(params.plan.first, planned_groups + 1);
      take(params.plan.tiles, planned_groups);
    }
    params.merges_by_group = groups <= most_parts;
    params.most_merges = static_cast<int32_t>(std::min(groups, most_parts));
    take(params.merges, params.most_merges);
    take(params.partial, DecodeParts::places(most_parts) * params.rows * p.head_dim);
    take(params.sums, DecodeParts::places(most_parts) * params.rows);
    if (most_parts > workers) {
      take(params.next, 1);
      check_cuda(cudaMemsetAsync(params.next, 0, sizeof(int32_t), stream), "clearing the counter");
    }
    if (params.planned) {
      launch_kernel(decode_plan_kernel, {1}, kPlanThreads, 0, stream, {},
                    "launching the plan of decode attention", params);
    }
    launch(static_cast<uint32_t>(blocks), params.planned ? early() : cudaLaunchAttribute{});
    // Few groups have many pieces each.
    if (params.most_merges <= kFewMerges) {
      launch_merge<16>(params, stream);
    } else {
      launch_merge<4>(params, stream);
    }
  }

 private:
  static constexpr int kMostBlocks = 8;  // of a cluster, on any Hopper GPU; a power of two
  static_assert(kMostBlocks * DecodeRoles<Traits>::kWorkers <= 32, "a lane for each piece");
  static constexpr int32_t kFewTiles = 32;  // of a worker
  static constexpr int kLeastOfLine = 8;    // workers

  // The thread blocks of a cluster, if each group can have one at once and no worker gets many
  // tiles: what requests can have decides, since their lengths are known on the device alone. Not
  // all multiprocessors can be parts of clusters.
  static int32_t cluster_of(DecodeKeys const& keys, int64_t groups, int blocks) {
    int32_t cluster = kMostBlocks;
    while (cluster > 0 && groups * cluster > (cluster > 1 ? blocks / 2 : blocks)) {
      cluster /= 2;
    }
    int64_t const tiles = ceil_div(most_slots(keys), int64_t{DecodeKeys::kTile});
    bool const few = tiles <= int64_t{cluster} * DecodeRoles<Traits>::kWorkers * kFewTiles;
    return keys.split == 0 && few ? cluster : 0;
  }
  // All KV heads, if they have the same tiles and few workers are left over.
  static int32_t lines_of(FmhaProblem const& p, DecodeKeys const& keys, int blocks) {
    bool alike = true;
    for (IndexTable const* table :
         {&keys.lengths, &keys.starts, &keys.span_lengths, &keys.counts}) {
      alike = alike && (table->data == nullptr || table->head_stride == 0);
    }
    bool const enough = p.heads_kv * kLeastOfLine <= blocks * DecodeRoles<Traits>::kWorkers;
    return alike && enough ? p.heads_kv : 1;
  }

  static constexpr int32_t kFewMerges = 128;
  static constexpr int32_t kMostMergeBlocks = 4096;

  template <int kWarps>
  static void launch_merge(DecodeParams const& params, cudaStream_t stream) {
    auto const entries = static_cast<uint32_t>(std::min(params.most_merges, kMostMergeBlocks));
    launch_kernel(decode_merge_kernel<Element, kWarps>,
                  {entries, static_cast<uint32_t>(params.rows)}, kWarps * 32, 0, stream, early(),
                  "launching the merge of decode attention", params);
  }

  // The keys of a copy: slots from a multiple of this number on are consecutive rows.
  static int32_t box_of(DecodeKeys const& keys) {
    constexpr int32_t kSmallest = 16;  // smaller boxes are slower than single rows
    bool const spans = keys.starts.data != nullptr;
    if (keys.form == DecodeKeys::Form::kTokens || (spans && keys.page > 0)) {
      return 0;
    }
    int32_t box = DecodeKeys::kTile;
    for (int32_t run : {keys.page, keys.form == DecodeKeys::Form::kBlocks ? keys.block : 0}) {
      box = std::gcd(box, run);
    }
    return box >= kSmallest ? box : 0;
  }
  // Each line is read once: promotion to 256 bytes costs 3% of the bandwidth.
  static MapRows rows_of_boxes(DataType dtype) {
    return {dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2, 64, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
  }
  // The kernel waits for the one before it by itself.
  static cudaLaunchAttribute early() {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
  }
  static cudaLaunchAttribute of_clusters(int32_t blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    return attribute;
  }
  // `attribute`: {} for none.
  static void launch_kernel(void (*kernel)(DecodeParams), dim3 grid, int threads, size_t smem,
                            cudaStream_t stream, cudaLaunchAttribute attribute, char const* what,
                            DecodeParams const& params) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = attribute.id == cudaLaunchAttributeIgnore ? 0 : 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), what);
  }
  static constexpr double kCacheBytes = 100e6;  // twice the L2 cache

  // What the call may read of keys and values.
  static double cache_bytes(FmhaProblem const& p) {
    DecodeKeys const& keys = *p.decode;
    double const heads =
        static_cast<double>(p.batch) * p.heads_kv * (keys.by_query ? keys.len_q : 1);
    return heads * std::min<int64_t>(most_slots(keys), keys.capacity) * p.head_dim * 4;
  }
  // The slots that a request can have.
  static int64_t most_slots(DecodeKeys const& keys) {
    return keys.form == DecodeKeys::Form::kRange    ? keys.capacity
           : keys.form == DecodeKeys::Form::kBlocks ? int64_t{keys.entries.width} * keys.block
                                                    : keys.entries.width;
  }
  // Rows are copied in chunks of 16 bytes.
  static void check_copies(char const* name, TensorView const& t) {
    for (int64_t stride : {t.batch_stride, t.axis_stride[kGridAxes - 1], t.head_stride}) {
      if (stride % 8 != 0 || reinterpret_cast<uintptr_t>(t.data) % 16 != 0) {
        throw std::runtime_error(std::string("sparse_fmha: ") + name +
                                 " must start, and have strides, at multiples of 16 bytes on a "
                                 "GPU; copy it");
      }
    }
  }
};

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Launch = DecodeLaunch<Config>;
  KernelRow row;
  row.info.key = {Arch::kSm90,
                  Pass::kDecode,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  mechanism_index<typename Config::Mechanism>(),
                  Launch::Traits::kVotes};
  row.info.name = name;
  row.info.mechanism = Config::Mechanism::kName;
  row.info.tile_q = Config::kTileQ;
  row.info.tile_k = Config::kTileK;
  row.info.stages = Config::kStages;
  row.info.threads = DecodeRoles<typename Launch::Traits>::kThreads;
  row.info.smem_bytes = sizeof(typename Launch::Storage);
  row.launch = &Launch::run;
  return row;
}

}  // namespace sparse_fmha::sm90
