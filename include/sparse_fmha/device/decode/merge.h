// The small kernels around decode attention: the plan of many groups, before it, and the merge of
// the pieces of groups that several parts share, after it.
#pragma once

#include "sparse_fmha/device/decode/finish.h"
#include "sparse_fmha/device/decode/pieces.h"
#include "sparse_fmha/device/dependent_launch.h"

namespace sparse_fmha::device {

inline constexpr int kPlanThreads = 1024;

// Run by one block: fills in the plan. Params: DecodeParams, or a type of the family that has them,
// so that kernels of several families differ in name.
template <class Params>
__global__ void __launch_bounds__(kPlanThreads)
    decode_plan_kernel(Params const __grid_constant__ params) {
  __shared__ int32_t warp_units[kPlanThreads / 32];
  let_next_kernel_begin();
  plan_groups(params, params.plan, warp_units);
}

// A block for each row of each entry of `merges`: the warps merge every kMergeWarps-th piece of the
// group, in order. Then their results are merged, in order.
template <class Element, int kMergeWarps, class Params>
__global__ void __launch_bounds__(kMergeWarps * 32)
    decode_merge_kernel(Params const __grid_constant__ params) {
  constexpr int kMostColumns = 8;  // of a lane
  __shared__ float out[kMergeWarps][256];
  __shared__ float2 sums[kMergeWarps];
  wait_for_kernel_before();
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int32_t const row = blockIdx.y;
  CUTE_NO_UNROLL
  for (int32_t entry = blockIdx.x; entry < params.most_merges; entry += gridDim.x) {
    int4 const merge = params.merges[entry];
    if (merge.x < 0) {
      continue;
    }
    auto const at = params.group(merge.x);
    KeyRange const rows = params.keys.rows_of(at.row_group);
    if (row >= rows.end - rows.begin) {
      continue;
    }
    int32_t const first = merge.y;
    int32_t const last = merge.z;
    float top = -INFINITY;
    float sum = 0.f;
    float mine[kMostColumns] = {};
    for (int32_t base = first + warp; base <= last; base += 32 * kMergeWarps) {
      int32_t const piece = base + lane * kMergeWarps;
      float2 here = {-INFINITY, 0.f};
      if (piece <= last) {
        here = params.sums[DecodeParts::place(piece, piece == first) * params.rows + row];
      }
      float high = here.x;
      CUTE_NO_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, step));
      }
      high = fmaxf(high, top);
      float const old = top == -INFINITY ? 0.f : exp2f(top - high);
      float const factor = here.x == -INFINITY ? 0.f : exp2f(here.x - high);
      float added = here.y * factor;
      CUTE_NO_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        added += __shfl_xor_sync(0xffffffff, added, step);
      }
      sum = sum * old + added;
      top = high;
      CUTE_UNROLL
      for (int i = 0; i < kMostColumns; ++i) {
        mine[i] *= old;
      }
      int const count = min_int(32, (last - base) / kMergeWarps + 1);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        int32_t const from = base + i * kMergeWarps;
        float const weight = __shfl_sync(0xffffffff, factor, i);
        float const* const partial =
            params.partial +
            (DecodeParts::place(from, from == first) * params.rows + row) * params.head_dim;
        CUTE_UNROLL
        for (int c = 0; c < kMostColumns; c += 4) {
          int const column = c * 32 + lane * 4;
          if (weight != 0.f && column < params.head_dim) {
            float4 const x = *reinterpret_cast<float4 const*>(partial + column);
            mine[c] += x.x * weight;
            mine[c + 1] += x.y * weight;
            mine[c + 2] += x.z * weight;
            mine[c + 3] += x.w * weight;
          }
        }
      }
    }
    __syncthreads();  // the last row was read
    CUTE_UNROLL
    for (int c = 0; c < kMostColumns; c += 4) {
      *reinterpret_cast<float4*>(&out[warp][c * 32 + lane * 4]) = {mine[c], mine[c + 1],
                                                                   mine[c + 2], mine[c + 3]};
    }
    if (lane == 0) {
      sums[warp] = {top, sum};
    }
    __syncthreads();
    top = -INFINITY;
    CUTE_UNROLL
    for (int w = 0; w < kMergeWarps; ++w) {
      top = fmaxf(top, sums[w].x);
    }
    sum = 0.f;
    float factors[kMergeWarps];
    CUTE_UNROLL
    for (int w = 0; w < kMergeWarps; ++w) {
      factors[w] = sums[w].x == -INFINITY ? 0.f : exp2f(sums[w].x - top);
      sum += sums[w].y * factors[w];
    }
    DecodeRow const to(params, at, rows.begin + row);
    FinishedRow const end = finish_row(params.keys, to.head, top, sum);
    auto* const result = static_cast<Element*>(params.out.data) + to.offset(params.out);
    for (int column = threadIdx.x; column < params.head_dim; column += kMergeWarps * 32) {
      float x = 0.f;
      CUTE_UNROLL
      for (int w = 0; w < kMergeWarps; ++w) {
        x += out[w][column] * factors[w];
      }
      result[column] = static_cast<Element>(x * end.factor);
    }
    if (threadIdx.x == 0) {
      to.store_lse(params, end.lse);
    }
  }
}

}  // namespace sparse_fmha::device
