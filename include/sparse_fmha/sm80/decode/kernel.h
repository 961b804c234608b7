// Decode attention of up to 64 packed rows: a persistent kernel. All threads of a block copy, by
// single rows, and each warp computes 16 rows; several blocks on a multiprocessor hide each other's
// waits. How keys are shared among blocks is that of Hopper's kernel (device/decode).
#pragma once

#include "sparse_fmha/device/decode/queries.h"
#include "sparse_fmha/device/decode/results.h"
#include "sparse_fmha/sm80/decode/walk.h"

namespace sparse_fmha::sm80 {

template <class Traits>
using WalkOf = std::conditional_t<Traits::kVotes, VotingDecodeWalk<Traits>, DecodeWalk<Traits>>;

template <class Traits>
__device__ __forceinline__ void attend(DecodeParams const& params, DecodeStorage<Traits>& smem,
                                       DecodeResults<typename Traits::Element> const& results) {
  WalkOf<Traits> walk{{params, smem}};
  walk.begin();
  load_decode_queries<Traits::kHeadDim>(
      params, smem.piece.at, walk.steps.rows(), smem.queries(),
      [](int row, int column) { return chunk_place<Traits::kRowDim>(row, column / 8); });
  __syncthreads();
  Queries<Traits> const queries(smem.queries());
  DecodeOutput<Traits> output;
  cute::clear(output);
  OnlineSoftmax softmax(params.scale_log2);
  walk.run(queries, softmax, output);
  results.store(smem.piece, walk.steps.rows(), softmax, output);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMostBlocks)
    decode_attention_kernel(DecodeParams const __grid_constant__ params) {
  extern __shared__ __align__(128) char raw_smem[];
  auto& smem = *reinterpret_cast<DecodeStorage<Traits>*>(raw_smem);
  if (threadIdx.x == 0) {
    smem.plan = params.planned ? params.plan : DecodePlan{smem.first, smem.tiles};
    smem.part = blockIdx.x;
  }
  __syncthreads();
  if (!params.planned) {
    plan_groups(params, smem.plan, smem.warp_units);
  }
  auto const worker = static_cast<int32_t>(blockIdx.x);
  auto const workers = static_cast<int32_t>(gridDim.x);
  if (threadIdx.x == 0) {
    new (smem.cut_place) DecodeParts(params.parts(smem.plan.first[params.groups], workers));
  }
  __syncthreads();
  DecodeParts const& cut = smem.cut();
  DecodeResults<typename Traits::Element> const results{params};
  while (smem.part < cut.count()) {
    results.begin_part(smem.part);
    if (threadIdx.x == 0) {
      smem.begin_part(params);
    }
    __syncthreads();
    while (smem.unit < smem.end) {
      attend<Traits>(params, smem, results);
      __syncthreads();
      if (threadIdx.x == 0) {
        smem.next_piece(params);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      smem.part =
          params.next == nullptr ? smem.part + workers : workers + atomicAdd(params.next, 1);
    }
    __syncthreads();
  }
  results.store_empty_groups(smem.plan, worker, workers);
  results.clear_merges_from(cut.count(), worker, workers);
}

}  // namespace sparse_fmha::sm80
