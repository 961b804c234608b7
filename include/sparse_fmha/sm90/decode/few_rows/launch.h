// Host code: the launch of a decode kernel of few rows.
#pragma once

#include <atomic>
#include <string>

#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/planning/few_rows.h"
#include "sparse_fmha/sm90/decode/boxes.h"
#include "sparse_fmha/sm90/decode/few_rows/kernel.h"

namespace sparse_fmha::sm90 {

template <class Config>
struct FewRowsLaunch {
  using Traits = FewRowsTraits<Config>;
  using Storage = FewRowsStorage<Traits>;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr bool kVotes = false;
  static_assert(Traits::kTileQ == FewRows::kRows && Traits::kMostBlocks == FewRows::kMostBlocks,
                "calls are chosen and shared by planning/few_rows.h");
  static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                "the stages do not fit the shared memory of a Hopper block");

  static void run(FmhaProblem const& p, ExecutionContext const& context) {
    static OncePerDevice raise_limit;
    raise_limit([] {
      check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    FewRowsParams params = {};
    describe_decode(params, p);
    describe_boxes(params, p, Traits::kTileK);
    params.blocks = FewRows::blocks(params.groups, most_slots(params.keys), clusters_at_once());
    if (int64_t{params.groups} * params.blocks > INT32_MAX) {
      params.blocks = 1;
    }
    Cluster cluster(params.blocks);
    cluster.config.gridDim = dim3(static_cast<uint32_t>(params.groups * params.blocks));
    cluster.config.stream = static_cast<cudaStream_t>(context.stream);
    check_cuda(cudaLaunchKernelEx(&cluster.config, kKernel, params),
               "launching the decode kernel of few rows");
  }

 private:
  static constexpr auto* kKernel = &few_rows_decode_kernel<Traits>;

  struct Cluster {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};

    explicit Cluster(int32_t blocks) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<uint32_t>(blocks), 1, 1};
      config.gridDim = dim3(static_cast<uint32_t>(blocks));
      config.blockDim = dim3(Traits::kThreads);
      config.dynamicSmemBytes = sizeof(Storage);
      config.attrs = &attribute;
      config.numAttrs = blocks > 1 ? 1 : 0;
    }
    Cluster(Cluster const&) = delete;
  };

  // Of the current GPU, asked once.
  static FewRows::AtOnce clusters_at_once() {
    static std::array<std::array<std::atomic<int>, FewRows::kMostBlocks + 1>, kMaxDevices> kept;
    int const device = current_device();
    FewRows::AtOnce result = {};
    for (int32_t blocks = 2; blocks <= FewRows::kMostBlocks; ++blocks) {
      int known = device < kMaxDevices ? kept[device][blocks].load(std::memory_order_relaxed) : 0;
      if (known == 0) {
        Cluster const cluster(blocks);
        int count = 0;
        check_cuda(cudaOccupancyMaxActiveClusters(&count, kKernel, &cluster.config),
                   "asking for the clusters that run at once");
        known = count + 1;  // zero: not asked yet
        if (device < kMaxDevices) {
          kept[device][blocks].store(known, std::memory_order_relaxed);
        }
      }
      result[blocks] = known - 1;
    }
    return result;
  }
};

}  // namespace sparse_fmha::sm90
