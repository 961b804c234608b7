// The registry row of a decode kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/sm90/common/data_type.h"
#include "sparse_fmha/sm90/common/tile_config.h"
#include "sparse_fmha/sm90/decode/kernel.h"
#include "sparse_fmha/sm90/decode/merge.h"

namespace sparse_fmha::sm90 {

template <class Config>
struct DecodeLaunch {
  using Traits = TileTraits<Config>;
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
    int64_t const pieces = groups + (keys.split > 0 ? groups * most_splits(keys) : blocks);
    auto take = [&](auto*& to, int64_t count) {
      to = static_cast<std::remove_reference_t<decltype(to)>>(
          context.memory->allocate(count * sizeof(*to)));
    };
    take(params.first, groups + 1);
    take(params.tiles, groups);
    take(params.partial, pieces * params.rows * p.head_dim);
    take(params.sums, pieces * params.rows);

    auto* const kernel = &decode_attention_kernel<Traits>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    auto const stream = static_cast<cudaStream_t>(context.stream);
    decode_plan_kernel<<<1, kPlanThreads, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "launching the plan of decode attention");
    kernel<<<blocks, 256, sizeof(Storage), stream>>>(params);
    check_cuda(cudaGetLastError(), "launching the decode kernel");
    decode_merge_kernel<Element>
        <<<params.groups * params.rows, ceil_div(p.head_dim, 32) * 32, 0, stream>>>(params, blocks);
    check_cuda(cudaGetLastError(), "launching the merge of decode attention");
  }

 private:
  static int64_t most_splits(DecodeKeys const& keys) {
    int64_t const slots = keys.form == DecodeKeys::Form::kRange ? keys.capacity
                          : keys.form == DecodeKeys::Form::kBlocks
                              ? int64_t{keys.entries.width} * keys.block
                              : keys.entries.width;
    return (slots + keys.split - 1) / keys.split;
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

template <class Config>
KernelRow kernel_row(char const* name) {
  using Launch = DecodeLaunch<Config>;
  KernelRow row;
  row.info.key = {Arch::kSm90,
                  Pass::kDecode,
                  data_type(typename Config::Element{}),
                  Config::kHeadDim,
                  mechanism_index<typename Config::Mechanism>(),
                  false};
  row.info.name = name;
  row.info.mechanism = Config::Mechanism::kName;
  row.info.tile_q = Config::kTileQ;
  row.info.tile_k = Config::kTileK;
  row.info.stages = Config::kStages;
  row.info.threads = 256;
  row.info.smem_bytes = sizeof(typename Launch::Storage);
  row.launch = &Launch::run;
  return row;
}

}  // namespace sparse_fmha::sm90
