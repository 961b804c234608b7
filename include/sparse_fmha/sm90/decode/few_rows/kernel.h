// Decode attention of up to 16 packed rows in one launch: a cluster of thread blocks for each group
// (request, KV head, rows), whose warps share the group's tiles. Nothing is planned or kept in
// device memory, and few instructions come before the first copy.
#pragma once

#include "sparse_fmha/planning/few_rows.h"
#include "sparse_fmha/sm90/decode/few_rows/merge.h"
#include "sparse_fmha/sm90/decode/few_rows/walk.h"

namespace sparse_fmha::sm90 {

// How many of a cluster's blocks share a group of `slots` keys: as many as its share of the keys of
// all requests is of the blocks that keep memory busy. Called by all threads.
template <class Traits>
__device__ __forceinline__ int32_t blocks_of_group(FewRowsParams const& params,
                                                   DecodeParams::Group const& at, int32_t slots,
                                                   int64_t* warp_slots) {
  int32_t const requests = params.groups / (params.heads_kv * params.row_groups);
  if (requests == 1) {
    return FewRows::blocks_of(slots, slots, params.groups, params.blocks);
  }
  int64_t of_all = 0;  // of one head
  CUTE_NO_UNROLL
  for (int32_t request = threadIdx.x; request < requests; request += Traits::kThreads) {
    KeyRange const seen = decode_slots(params.keys, request, at.head, at.row_group);
    of_all += seen.end - seen.begin;
  }
  CUTE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    of_all += __shfl_xor_sync(0xffffffff, of_all, step);
  }
  if (threadIdx.x % 32 == 0) {
    warp_slots[threadIdx.x / 32] = of_all;
  }
  __syncthreads();
  of_all = 0;
  CUTE_UNROLL
  for (int w = 0; w < Traits::kWarps; ++w) {
    of_all += warp_slots[w];
  }
  return FewRows::blocks_of(slots, of_all, params.heads_kv * params.row_groups, params.blocks);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    few_rows_decode_kernel(FewRowsParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<FewRowsStorage<Traits>*>(raw_smem);
  int const warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  int const lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.k_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&params.v_map));
  }
  if (lane < Traits::kStages) {
    smem.full[warp][lane].init(1);
  }
  cutlass::arch::fence_barrier_init();
  __syncwarp();

  int32_t const group = blockIdx.x / params.blocks;
  int const block = blockIdx.x % params.blocks;
  DecodeParams::Group const at = params.group(group);
  KeyRange const rows = params.keys.rows_of(at.row_group);
  KeyRange const slots = decode_slots(params.keys, at.batch, at.head, at.row_group);
  KeyRange const tiles = {slots.begin / Traits::kTileK, ceil_div(slots.end, Traits::kTileK)};
  int32_t blocks = 1;
  if (params.blocks > 1) {
    blocks = blocks_of_group<Traits>(params, at, slots.end - slots.begin, smem.warp_slots);
    if (block >= blocks) {
      return;  // the cluster's barriers do not wait for threads that have left
    }
    cute::cluster_arrive_relaxed();
  }
  DecodePiece const piece = {at, group, tiles, 0, 0, true};
  PieceKeys const keys(params, piece);
  int32_t const share = ceil_div(tiles.end - tiles.begin, blocks);
  KeyRange const mine = {tiles.begin + block * share + warp,
                         min_int(tiles.end, tiles.begin + (block + 1) * share)};
  FewRowsWalk<Traits> walk(params, piece, keys, rows, mine, smem.stages[warp], smem.full[warp]);
  walk.begin();
  FewQueries<Traits> const queries(params, at, rows);
  typename FewRowsWalk<Traits>::Output output;
  cute::clear(output);
  OnlineSoftmax softmax(params.scale_log2);
  walk.run(queries, softmax, output);
  FewRowsMerge<Traits> const merge{params, smem, at, rows, block, blocks};
  merge.put(softmax, output);
  merge.finish();
}

}  // namespace sparse_fmha::sm90
