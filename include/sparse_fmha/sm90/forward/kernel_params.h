// Parameters of the kernel.
#pragma once

#include <cuda.h>

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/key_bias.h"
#include "sparse_fmha/sm90/common/soft_cap.h"

namespace sparse_fmha::sm90 {

template <class Geometry, class Mechanism>
struct KernelParams {
  typename Geometry::Params geometry;  // tensors and tile shapes
  typename Mechanism::Params sparsity;
  int32_t heads_per_kv;  // query heads per key head
  float scale_log2;      // |scale| * log2(e), never zero
  bool negate;           // the scale is negative
  Scheduler scheduler;
  SkipParams skip;  // this and the next are last: few kernels read them
  BiasParams bias;
  SoftCap soft_cap;
};

}  // namespace sparse_fmha::sm90
