// Parameters of the kernel.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/device/skip_vote.h"

namespace sparse_fmha::sm80 {

template <class Geometry, class Mechanism>
struct KernelParams {
  typename Geometry::Params geometry;
  typename Mechanism::Params sparsity;
  TensorView q;
  TensorView k;
  TensorView v;
  void* out;   // [B, Lq, Hq, D], contiguous; in the backward pass the gradient of q
  float* lse;  // [B, Lq, Hq], contiguous
  int32_t head_dim;
  int32_t heads_q;
  int32_t heads_per_kv;  // query heads per key head
  float scale_log2;      // |scale| * log2(e), never zero; in the backward pass with its sign
  float exponent_scale;  // the same, or 1 if scores have been scaled with their biases
  bool negate;           // the scale is negative
  TokenNumbers key_bias;
  device::Scheduler scheduler;
  device::SkipParams skip;  // kernels without skipping do not read it
  // In the backward pass:
  TensorView dout;      // [B, Lq, Hq, D]
  float4 const* terms;  // [B, Lq, Hq], as in Gradients::row_terms
};

// The first element of a head.
template <class Element>
__device__ __forceinline__ Element const* head_of(TensorView const& view, int32_t batch,
                                                  int32_t head) {
  return static_cast<Element const*>(view.data) + batch * view.batch_stride +
         head * view.head_stride;
}

}  // namespace sparse_fmha::sm80
