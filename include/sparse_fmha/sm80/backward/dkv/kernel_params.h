// Parameters of the dK/dV kernel.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha::sm80 {

template <class Geometry, class Mechanism>
struct DkvParams {
  typename Geometry::Params geometry;
  typename Mechanism::Params sparsity;
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView dout;
  float4 const* terms;  // [B, Lq, Hq], as in Gradients::row_terms
  void* dk;             // [B, Lkv, Hkv, D], contiguous
  void* dv;
  int32_t head_dim;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t heads_per_kv;  // query heads per key head
  float scale;
  float scale_log2;      // scale * log2(e), never zero
  float exponent_scale;  // the same, or 1 if scores have been scaled with their biases
  TokenNumbers key_bias;
  float* bias_gradients;        // [B, Hq, keys], contiguous; nullptr: not wanted
  int64_t keys;                 // of a head
  device::Scheduler scheduler;  // q_tiles: key tiles
};

}  // namespace sparse_fmha::sm80
