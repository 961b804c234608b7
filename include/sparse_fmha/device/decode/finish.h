// The end of a decode row.
#pragma once

#include "sparse_fmha/device/decode/params.h"

namespace sparse_fmha::device {

// A row of packed queries in the tensors of the call.
struct DecodeRow {
  int32_t batch;
  int32_t query;
  int64_t head;  // query head

  __device__ __forceinline__ DecodeRow(DecodeParams const& params, DecodeParams::Group const& at,
                                       int32_t row)
      : batch(at.batch),
        query(row / params.keys.group),
        head(int64_t{at.head} * params.keys.group + row % params.keys.group) {}

  __device__ __forceinline__ int64_t offset(TensorView const& of) const {
    return batch * of.batch_stride + query * of.axis_stride[kGridAxes - 1] + head * of.head_stride;
  }
  __device__ __forceinline__ void store_lse(DecodeParams const& params, float lse) const {
    int64_t const heads = int64_t{params.heads_kv} * params.keys.group;
    params.lse[(int64_t{batch} * params.keys.len_q + query) * heads + head] = lse;
  }
};

struct FinishedRow {
  float factor;  // of the output
  float lse;
};

// `top`: the row's reference in log2 units; -inf and a sum of 0 if it sees no key.
__device__ __forceinline__ FinishedRow finish_row(DecodeKeys const& keys, int64_t head, float top,
                                                  float sum) {
  constexpr float kLn2 = 0.69314718055994530942f;
  bool const empty = sum == 0.f;
  float const lse = empty ? -INFINITY : (top + log2f(sum)) * kLn2;
  float const factor = empty ? 0.f : 1.f / sum;
  if (keys.sink == nullptr) {
    return {factor, lse};
  }
  float const sink = keys.sink[head * keys.sink_stride];
  float const above = fmaxf(lse, sink);
  float const total = above == -INFINITY || above == INFINITY
                          ? above
                          : above + logf(expf(lse - above) + expf(sink - above));
  return {empty ? 0.f : factor * expf(lse - total), total};
}

}  // namespace sparse_fmha::device
