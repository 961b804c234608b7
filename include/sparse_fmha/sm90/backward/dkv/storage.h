// Shared memory and parameters of a dK/dV kernel.
#pragma once

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry>
struct DkvStorage {
  using Element = typename Traits::Element;

  // Gradients overwrite values and keys before they are stored.
  alignas(1024) Element k[Traits::kKeyElements];
  alignas(1024) Element v[Traits::kKeyElements];
  alignas(1024) Element q[Traits::kStages * Traits::kRowElements];
  alignas(1024) Element dout[Traits::kStages * Traits::kRowElements];
  alignas(128) RowTerms terms[Traits::kStages][Traits::kTileQ];

  Ring<1> ring_keys;       // keys and values
  EmptyBarrier keys_read;  // by all warps that hold the same keys
  Ring<Traits::kStages> ring_q;
  Ring<Traits::kStages> ring_dout;
  WorkSlot<typename Geometry::Work> work;
  typename Geometry::Shared geometry;
};

template <class Geometry, class Mechanism>
struct DkvParams {
  typename Geometry::Params geometry;  // tensors and tile shapes
  typename Mechanism::Params sparsity;
  int32_t heads_per_kv;  // query heads per key head
  float scale;
  float scale_log2;  // scale * log2(e)
  Scheduler scheduler;
};

}  // namespace sparse_fmha::sm90
