// Shared memory and parameters of a dK/dV kernel.
#pragma once

#include <type_traits>

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/backward/dkv/key_bias.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/soft_cap.h"

namespace sparse_fmha::sm90 {

// fp32 sums of dQ without the scale, in the format of device/query_sums.h. Zero at launch.
struct DqSums {
  float4* data;
  int32_t heads;
  int32_t tiles;  // of 64 queries, of one head
  int32_t head_dim;
  int32_t first_batch;  // of the launch
  // Index of the first tile of a head among those of all heads.
  __device__ __forceinline__ int32_t first_tile(int32_t batch, int32_t head) const {
    return ((first_batch + batch) * heads + head) * tiles;
  }
};

template <class Traits, class Geometry>
struct DkvStorage {
  using Element = typename Traits::Element;

  alignas(1024) Element k[Traits::kKeyElements];
  alignas(1024) Element v[Traits::kKeyElements];
  alignas(1024) Element q[Traits::kStages * Traits::kRowElements];
  alignas(1024) Element dout[Traits::kStages * Traits::kRowElements];
  alignas(128) RowTerms terms[Traits::kStages][Traits::kTileQ];

  Ring<1> ring_keys;       // keys and values
  EmptyBarrier keys_read;  // by all warps that read keys which the gradients overwrite
  Ring<Traits::kStages> ring_q;
  Ring<Traits::kStages> ring_dout;
  WorkSlot<typename Geometry::Work> work;
  typename Geometry::Shared geometry;
  ThreadBiases<Traits> biases;
};

// With dQ: the gradients of scores, between the consumers and the warpgroup of dQ.
template <class Traits, class Geometry>
struct DkvStorageWithDq : DkvStorage<Traits, Geometry> {
  alignas(1024) typename Traits::Element grads[Traits::kStages * Traits::kGradElements];
  // The query tile of a step, for twice as many steps as there are stages: dQ is added up when the
  // step's queries have been released.
  int32_t query_tiles[2][Traits::kStages];
  Ring<Traits::kStages> ring_grads;
  // What a consumer is storing: dV or dK of its 64 keys, or 64 fp32 rows of its columns of dQ.
  alignas(1024) float4 slabs[Traits::kConsumers][64 * Traits::kHeadDim / 8];

  __device__ __forceinline__ int32_t& query_tile(RingState<Traits::kStages> const& state) {
    return query_tiles[state.phase][state.index];
  }
};

template <class Traits, class Geometry>
using StorageOf = std::conditional_t<Traits::kAddsDq, DkvStorageWithDq<Traits, Geometry>,
                                     DkvStorage<Traits, Geometry>>;

template <class Geometry, class Mechanism>
struct DkvParams {
  typename Geometry::Params geometry;  // tensors and tile shapes
  typename Mechanism::Params sparsity;
  int32_t heads_per_kv;  // query heads per key head
  float scale;
  float scale_log2;      // scale * log2(e)
  float exponent_scale;  // the same, or 1 where scores have been scaled with a bias or a cap
  Scheduler scheduler;
  DkvBiasParams bias;
  DqSums dq = {};  // of kernels that add dQ up
  SoftCap soft_cap = {};
};

}  // namespace sparse_fmha::sm90
