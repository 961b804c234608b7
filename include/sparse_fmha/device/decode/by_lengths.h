// Which of two decode kernels that were launched for a call does its work.
#pragma once

#include "sparse_fmha/device/decode/params.h"

namespace sparse_fmha::device {

// Called by whole warps: whether the call is left to the kernel for few rows.
__device__ __forceinline__ bool takes_few_rows(DecodeParams const& params) {
  int32_t const heads = params.by_lengths.heads;
  SlotTotals totals;
#pragma unroll 4
  for (int32_t list = threadIdx.x % 32; list < params.by_lengths.lists; list += 32) {
    KeyRange const slots = decode_slots(params.keys, list / heads, list % heads, 0);
    totals.add(slots.end - slots.begin);
  }
  CUTE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    totals.sum += __shfl_xor_sync(0xffffffff, totals.sum, step);
    totals.longest = max_int(totals.longest, __shfl_xor_sync(0xffffffff, totals.longest, step));
  }
  totals.count = params.by_lengths.lists;
  return totals.alike(params.by_lengths.blocks);
}

// Of a kernel that leaves: nothing is to be merged.
__device__ __forceinline__ void clear_merges(DecodeParams const& params) {
  for (int32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < params.most_merges;
       i += gridDim.x * blockDim.x) {
    params.merges[i] = {-1, 0, 0, 0};
  }
}

}  // namespace sparse_fmha::device
