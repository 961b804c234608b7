// What the launcher hands to the kernel.
#pragma once

#include <cuda.h>

#include "sparse_fmha/sm90/scheduler.h"

namespace sparse_fmha::sm90 {

// For kernels that leave key tiles out.
struct SkipParams {
  float const* threshold;      // [B]
  unsigned long long* counts;  // [B, Hq, 2]: tiles visited, and those of them left out
  int32_t heads_q;
};

template <class Geometry, class Mechanism>
struct KernelParams {
  typename Geometry::Params geometry;  // tensors and tile shapes
  typename Mechanism::Params sparsity;
  int32_t heads_per_kv;  // query heads that share a key head
  float scale_log2;      // |scale| * log2(e), never zero
  bool negate;           // the scale is negative
  Scheduler scheduler;
  SkipParams skip;  // last: other kernels do not read it
};

}  // namespace sparse_fmha::sm90
