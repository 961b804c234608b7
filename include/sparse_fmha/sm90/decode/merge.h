// The small kernels around decode attention: which keys each group has, before it, and the merge of
// the pieces, after it.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

inline constexpr int kPlanThreads = 1024;

// Run by one block: fills in `first` and `tiles`.
static __global__ void __launch_bounds__(kPlanThreads)
    decode_plan_kernel(DecodeParams const __grid_constant__ params) {
  __shared__ int64_t warp_units[32];
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t base = 0; base < params.groups; base += kPlanThreads) {
    int64_t const group = base + threadIdx.x;
    int64_t end = 0;
    if (group < params.groups) {
      auto const at = params.group(static_cast<int32_t>(group));
      KeyRange const tiles = decode_tiles(params.keys, at.batch, at.head, at.row_group);
      params.tiles[group] = tiles;
      end = ceil_div(tiles.end - tiles.begin, params.unit_tiles());
    }
    for (int step = 1; step < 32; step *= 2) {
      int64_t const left = __shfl_up_sync(0xffffffff, end, step);
      end += lane >= step ? left : 0;
    }
    if (lane == 31) {
      warp_units[warp] = end;
    }
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kPlanThreads / 32; ++w) {
      end += w < warp ? warp_units[w] : 0;
      total += warp_units[w];
    }
    if (group < params.groups) {
      params.first[group + 1] = before + end;
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    params.first[0] = 0;
  }
}

// A block for each row of each group: merges its pieces in order.
template <class Element>
__global__ void __launch_bounds__(256)
    decode_merge_kernel(DecodeParams const __grid_constant__ params, int32_t blocks) {
  constexpr float kLn2 = 0.69314718055994530942f;
  DecodeKeys const& keys = params.keys;
  int32_t const group = blockIdx.x / params.rows;
  int32_t const r = blockIdx.x % params.rows;
  auto const at = params.group(group);
  KeyRange const rows = keys.rows_of(at.row_group);
  if (r >= rows.end - rows.begin) {
    return;
  }
  int64_t const begin = params.first[group];
  int64_t const end = params.first[group + 1];
  DecodeParts const cut = params.parts(blocks);
  float most = -INFINITY;
  float sum = 0.f;
  float out = 0.f;
  if (begin < end) {
    int64_t const last = cut.part_of(end - 1);
    for (int64_t part = cut.part_of(begin); part <= last; ++part) {
      if (cut.begin(part) == cut.begin(part + 1)) {
        continue;  // no units
      }
      int64_t const from = DecodeParts::place(part, group) * params.rows + r;
      float2 const piece = params.sums[from];
      if (piece.x == -INFINITY) {
        continue;  // no key
      }
      float const next = fmaxf(most, piece.x);
      float const old = exp2f(most - next);
      float const factor = exp2f(piece.x - next);
      sum = sum * old + piece.y * factor;
      if (threadIdx.x < params.head_dim) {
        out = out * old + params.partial[from * params.head_dim + threadIdx.x] * factor;
      }
      most = next;
    }
  }
  int32_t const row = rows.begin + r;
  int32_t const query = row / keys.group;
  int64_t const head = int64_t{at.head} * keys.group + row % keys.group;
  bool const empty = sum == 0.f;
  float lse = empty ? -INFINITY : (most + log2f(sum)) * kLn2;
  float factor = empty ? 0.f : 1.f / sum;
  if (keys.sink != nullptr) {
    float const sink = keys.sink[head * keys.sink_stride];
    float const above = fmaxf(lse, sink);
    float const total = above == -INFINITY || above == INFINITY
                            ? above
                            : above + logf(expf(lse - above) + expf(sink - above));
    factor = empty ? 0.f : factor * expf(lse - total);
    lse = total;
  }
  if (threadIdx.x < params.head_dim) {
    static_cast<Element*>(params.out.data)[at.batch * params.out.batch_stride +
                                           query * params.out.axis_stride[kGridAxes - 1] +
                                           head * params.out.head_stride + threadIdx.x] =
        static_cast<Element>(out * factor);
  }
  if (threadIdx.x == 0) {
    params.lse[(int64_t{at.batch} * keys.len_q + query) * params.heads_kv * keys.group + head] =
        lse;
  }
}

}  // namespace sparse_fmha::sm90
