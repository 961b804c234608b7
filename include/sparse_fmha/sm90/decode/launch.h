// The registry row of a decode kernel.
#pragma once

#include <algorithm>
#include <numeric>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/device/decode/launch.h"
#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm90/decode/kernel.h"

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
    DecodeKeys const& keys = *p.decode;
    BoxedDecodeParams params = {};
    describe_decode(params, p);
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
    params.planned = params.groups > kPlannedGroups;
    take_decode_memory(params, int64_t{blocks} * DecodeRoles<Traits>::kWorkers, context);

    auto* const kernel = &decode_attention_kernel<Traits>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    launch_decode<Element>(kernel, blocks, DecodeRoles<Traits>::kThreads, sizeof(Storage),
                           LaunchOrder::kByItself, params,
                           static_cast<cudaStream_t>(context.stream));
  }

 private:
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
  static constexpr double kCacheBytes = 100e6;  // twice the L2 cache

  // What the call may read of keys and values.
  static double cache_bytes(FmhaProblem const& p) {
    DecodeKeys const& keys = *p.decode;
    double const heads =
        static_cast<double>(p.batch) * p.heads_kv * (keys.by_query ? keys.len_q : 1);
    return heads * std::min<int64_t>(most_slots(keys), keys.capacity) * p.head_dim * 4;
  }
};

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Launch = DecodeLaunch<Config>;
  KernelRow row = device::describe_row<Config>(name, Arch::kSm90, Pass::kDecode);
  row.info.key.skips = Launch::Traits::kVotes;
  row.info.threads = DecodeRoles<typename Launch::Traits>::kThreads;
  row.info.smem_bytes = sizeof(typename Launch::Storage);
  row.launch = &Launch::run;
  return row;
}

}  // namespace sparse_fmha::sm90
