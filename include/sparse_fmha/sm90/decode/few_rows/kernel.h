// Decode attention of up to 16 packed rows in one launch: a cluster of thread blocks for each group
// (request, KV head, rows), whose warps share the group's tiles. Nothing is planned or kept in
// device memory, and few instructions come before the first copy.
#pragma once

#include "sparse_fmha/sm90/decode/few_rows/merge.h"
#include "sparse_fmha/sm90/decode/few_rows/walk.h"

namespace sparse_fmha::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    few_rows_decode_kernel(FewRowsParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<FewRowsStorage<Traits>*>(raw_smem);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  int const lane = threadIdx.x % 32;
  if (params.blocks > 1) {
    cute::cluster_arrive_relaxed();
  }
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.k_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.v_map));
  }
  if (lane < Traits::kStages) {
    smem.full[warp][lane].init(1);
  }
  cutlass::arch::fence_barrier_init();
  __syncwarp();

  FewRowsKeys const keys(params);
  int const block = blockIdx.x;
  KeyRange const tiles = {keys.slots.begin / Traits::kTileK,
                          ceil_div(keys.slots.end, Traits::kTileK)};
  int32_t const share = params.blocks == 1 ? tiles.end - tiles.begin
                                           : ceil_div(tiles.end - tiles.begin, params.blocks);
  int32_t const first = tiles.begin + block * share;
  FewRowsWalk<Traits> const walk{params, keys, smem.stages[warp], smem.places[warp],
                                 smem.full[warp]};
  int32_t const end = min_int(tiles.end, first + share);
  walk.begin(first + warp, end);
  FewQueries<Traits> const queries(params, keys);
  typename FewRowsWalk<Traits>::Output output;
  cute::clear(output);
  OnlineSoftmax softmax(params.scale_log2);
  walk.run(first + warp, end, queries, softmax, output);
  FewRowsMerge<Traits> const merge{params, smem, keys.at, keys.rows, block};
  merge.put(softmax, output);
  merge.finish();
}

}  // namespace sparse_fmha::sm90
