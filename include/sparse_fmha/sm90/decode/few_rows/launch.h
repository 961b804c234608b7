// Host code: the launch of a decode kernel of few rows.
#pragma once

#include <stdexcept>

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
    if (!FewRows::serves(*p.decode, p.batch, p.heads_kv)) {
      throw std::runtime_error(
          "sparse_fmha: of the decode kernels for this head dim, this build has only that for few "
          "rows, which does not serve this call; build all of csrc/kernels/sm90_decode.def");
    }
    static OncePerDevice raise_limit;
    raise_limit([] {
      check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    FewRowsParams params = {};
    describe_decode(params, p);
    describe_boxes(params, p, Traits::kTileK);
    params.blocks = FewRows::blocks(params.groups, most_slots(params.keys));
    while (1 << params.box_log2 < params.box) {
      ++params.box_log2;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<uint32_t>(params.blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(params.blocks, p.heads_kv * params.row_groups, p.batch);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Storage);
    config.stream = static_cast<cudaStream_t>(context.stream);
    config.attrs = &attribute;
    config.numAttrs = params.blocks > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kKernel, params),
               "launching the decode kernel of few rows");
  }

 private:
  static constexpr auto* kKernel = &few_rows_decode_kernel<Traits>;
};

}  // namespace sparse_fmha::sm90
