// What a consumer of dK and dV does for dQ: nothing, or it hands the gradients of scores to those
// who compute dQ, of which it may be one.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/add_dq.h"
#include "sparse_fmha/sm90/backward/dkv/operands.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Another kernel computes dQ.
template <class Traits>
struct DqElsewhere {
  using State = RingState<Traits::kStages>;
  using Grads = typename Traits::Weights;  // of the scores of a step

  __device__ __forceinline__ void publish(Grads& /*grads*/, State const& /*of*/) const {}
  static __device__ __forceinline__ int new_sums() { return 0; }
  __device__ __forceinline__ void issue(int /*sums*/, State const& /*of*/, bool /*there*/) const {}
  __device__ __forceinline__ void add(int /*sums*/, State const& /*of*/, bool /*there*/) const {}
};

// A warpgroup of its own computes dQ.
template <class Traits, class Storage>
struct DqOfWarpgroup : DqElsewhere<Traits> {
  using State = RingState<Traits::kStages>;
  using Grads = typename Traits::Weights;

  Storage& smem;
  int const part;  // which 64 keys of the tile

  __device__ __forceinline__ DqOfWarpgroup(Storage& smem, int part) : smem(smem), part(part) {}

  __device__ __forceinline__ void publish(Grads& grads, State const& of) const {
    using namespace cute;
    auto tiles = make_tensor(make_smem_ptr(smem.grads), typename Traits::LayoutGrads{});
    auto rows = local_tile(tiles(_, _, of.index), Shape<_64, Int<Traits::kTileQ>>{},
                           make_coord(part, _0{}));
    auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, typename Traits::Element>{},
                                      typename Traits::MmaScores{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    // The registers of operand A are those of the accumulator.
    auto values = make_tensor(grads.data(), DkvOperands<Traits>::new_scores().layout());
    smem.ring_grads.acquire(of);
    cute::copy(copy_out, thread_copy.retile_S(values),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(rows)));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      smem.ring_grads.full[of.index].arrive();
    }
  }
};

// Each consumer computes some columns of dQ.
template <class Traits, class Geometry, class Mechanism>
struct DqOfConsumers : DqOfWarpgroup<Traits, DkvStorageWithDq<Traits, Geometry>> {
  using Storage = DkvStorageWithDq<Traits, Geometry>;
  using State = RingState<Traits::kStages>;

  AddDq<Traits, Geometry, Mechanism> const adder;

  __device__ __forceinline__ DqOfConsumers(DkvParams<Geometry, Mechanism> const& params,
                                           Storage& smem, int part)
      : DqOfWarpgroup<Traits, Storage>(smem, part), adder{params, smem} {}

  static __device__ __forceinline__ auto new_sums() { return decltype(adder)::new_sums(); }
  // Issues the product of the step whose stage this is. If there is none, the product is of no use
  // and is not added up: products in a branch would be serialised.
  template <class Sums>
  __device__ __forceinline__ void issue(Sums& sums, State const& of, bool there) const {
    if (there) {
      this->smem.ring_grads.wait(of);
    }
    forget(sums);
    adder.issue(sums, this->part, of);
  }
  template <class Sums>
  __device__ __forceinline__ void add(Sums& sums, State const& of, bool there) const {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sums);
    if (there) {
      this->smem.ring_grads.release(of);
      adder.add(sums, this->part, this->smem.query_tile(of));
    }
  }
};

template <class Traits, class Geometry, class Mechanism>
__device__ __forceinline__ auto consumer_dq(DkvParams<Geometry, Mechanism> const& params,
                                            StorageOf<Traits, Geometry>& smem, int part) {
  if constexpr (Traits::kDqByConsumers) {
    return DqOfConsumers<Traits, Geometry, Mechanism>(params, smem, part);
  } else if constexpr (Traits::kDqByWarpgroup) {
    return DqOfWarpgroup<Traits, StorageOf<Traits, Geometry>>(smem, part);
  } else {
    return DqElsewhere<Traits>{};
  }
}

}  // namespace sparse_fmha::sm90
