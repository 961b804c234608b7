// Parameters of the dK/dV kernel.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha::sm80 {

// fp32 sums of dQ without the scale, in the format of device/query_sums.h and the order kNumbers.
// Zero at launch.
struct DqSums {
  float* data;
  int32_t tiles;  // of 64 queries, of a head
};

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
  float scale_log2;             // scale * log2(e), never zero
  device::Scheduler scheduler;  // q_tiles: key tiles
  DqSums dq = {};               // of kernels that add dQ up
};

}  // namespace sparse_fmha::sm80
