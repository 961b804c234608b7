// The registry row of a decode kernel.
#pragma once

#include <type_traits>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm90/decode/boxes.h"
#include "sparse_fmha/sm90/decode/few_rows/launch.h"
#include "sparse_fmha/sm90/decode/kernel.h"

namespace sparse_fmha::sm90 {

template <class Config>
struct DecodeLaunch {
  using Traits = DecodeTraits<Config>;
  using Element = typename Config::Element;
  using Storage = DecodeStorage<Traits>;
  static constexpr int kThreads = DecodeRoles<Traits>::kThreads;
  static constexpr bool kVotes = Traits::kVotes;
  static_assert(Config::kTileQ == DecodeKeys::kRows && Config::kTileK == DecodeKeys::kTile,
                "groups of rows and tiles are those of core/decode.h");
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the stages do not fit the shared memory of a Hopper block");

  static void run(FmhaProblem const& p, ExecutionContext const& context) {
    BoxedDecodeParams params = {};
    describe_decode(params, p);
    int const blocks = multiprocessor_count();
    describe_boxes(params, p, DecodeKeys::kTile);
    params.planned = params.groups > kPlannedGroups;
    take_decode_memory(params, int64_t{blocks} * DecodeRoles<Traits>::kWorkers, context);

    auto* const kernel = &decode_attention_kernel<Traits>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    launch_decode<Element>(kernel, blocks, kThreads, sizeof(Storage), LaunchOrder::kByItself,
                           params, static_cast<cudaStream_t>(context.stream));
  }
};

// Static, because rows of different passes may have the same numbers.
template <class Config>
static KernelRow kernel_row(char const* name) {
  using Launch = std::conditional_t<Config::kTileQ == FewRows::kRows, FewRowsLaunch<Config>,
                                    DecodeLaunch<Config>>;
  KernelRow row = device::describe_row<Config>(name, Arch::kSm90, Pass::kDecode);
  row.info.key.skips = Launch::kVotes;
  row.info.threads = Launch::kThreads;
  row.info.smem_bytes = sizeof(typename Launch::Storage);
  row.launch = &Launch::run;
  return row;
}

}  // namespace sparse_fmha::sm90
