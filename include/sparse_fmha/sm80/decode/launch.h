// The registry row of a decode kernel.
#pragma once

#include <algorithm>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/decode/launch.h"
#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm80/decode/kernel.h"

namespace sparse_fmha::sm80 {

template <class Config>
struct DecodeLaunch {
  using Traits = DecodeTraits<Config>;
  using Storage = DecodeStorage<Traits>;
  static constexpr int kOfSystem = 1024;  // bytes of shared memory, of each block
  static_assert(Traits::kLeastBlocks * (sizeof(Storage) + kOfSystem) <=
                    smem_limit(Arch::kSm86) + kOfSystem,
                "the row serves both architectures");

  static void run(FmhaProblem const& p, ExecutionContext const& context) {
    DecodeParams params = {};
    describe_decode(params, p);
    params.planned = params.groups > Traits::kPlannedGroups;
    int const blocks = multiprocessor_count() * blocks_at_once();
    take_decode_memory(params, blocks, context);

    auto* const kernel = &decode_attention_kernel<Traits>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    launch_decode<typename Config::Element>(kernel, blocks, Traits::kThreads, sizeof(Storage),
                                            LaunchOrder::kAfter, params,
                                            static_cast<cudaStream_t>(context.stream));
  }

 private:
  // Of a multiprocessor.
  static int blocks_at_once() {
    int const bytes = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>();
    return std::clamp(bytes / static_cast<int>(sizeof(Storage) + kOfSystem), 1,
                      Traits::kMostBlocks);
  }
};

// Static, because rows of different passes may have the same numbers. The rows of both
// architectures share a kernel.
template <class Config, Arch kArch>
static KernelRow kernel_row(char const* name) {
  using Launch = DecodeLaunch<Config>;
  KernelRow row = device::describe_row<Config>(name, kArch, Pass::kDecode);
  row.info.key.skips = Launch::Traits::kVotes;
  row.info.threads = Launch::Traits::kThreads;
  row.info.smem_bytes = sizeof(typename Launch::Storage);
  row.launch = &Launch::run;
  return row;
}

}  // namespace sparse_fmha::sm80
