// Parameters of the kernel.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/key_bias.h"
#include "sparse_fmha/sm90/common/soft_cap.h"

namespace sparse_fmha::sm90 {

// A geometry may have a scheduler of its own.
template <class Geometry, class = void>
struct SchedulerOf {
  using Type = Scheduler;
};
template <class Geometry>
struct SchedulerOf<Geometry, std::void_t<typename Geometry::Scheduler>> {
  using Type = typename Geometry::Scheduler;
};

template <class Geometry, class Mechanism>
struct KernelParams {
  typename Geometry::Params geometry;  // tensors and tile shapes
  typename Mechanism::Params sparsity;
  int32_t heads_per_kv;  // query heads per key head
  float scale_log2;      // |scale| * log2(e), never zero
  bool negate;           // the scale is negative
  typename SchedulerOf<Geometry>::Type scheduler;
  SkipParams skip;  // this and the next are last: few kernels read them
  BiasParams bias;
  SoftCap soft_cap;
};

}  // namespace sparse_fmha::sm90
