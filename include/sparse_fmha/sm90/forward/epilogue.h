// The epilogue: from a warpgroup's accumulator to global memory, through shared memory and a TMA
// store that clips.
#pragma once

#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry>
struct Epilogue {
  using Element = typename Traits::Element;
  Geometry const& geometry;
  SharedStorage<Traits, Geometry>& smem;
  int const warpgroup;  // among the consumers

  // Called by all threads of the warpgroup.
  template <class Output>
  __device__ __forceinline__ void store(Output const& output, typename Geometry::Work const& work) {
    using namespace cute;
    if constexpr (!Traits::kOutputReplacesQ) {
      wait_for_store();
      sync();
    }
    auto tile = local_tile(make_tensor(make_smem_ptr(smem.out()), typename Traits::LayoutOut{}),
                           Shape<_64, Int<Traits::kValueDim>>{}, make_coord(warpgroup, _0{}));
    auto copy_out =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaPV{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    auto rounded = convert<Element>(output);
    cute::copy(copy_out, thread_copy.retile_S(rounded),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(tile)));
    tma_store_fence();
    sync();
    if (threadIdx.x % 128 == 0) {
      geometry.store_out(smem.out() + warpgroup * 64 * 64, work, warpgroup);
      tma_store_arrive();
    }
  }

  // Returns when the last store has read its shared memory.
  __device__ __forceinline__ void wait_for_store() {
    if (threadIdx.x % 128 == 0) {
      cute::tma_store_wait<0>();
    }
  }

  __device__ __forceinline__ void sync() {
    constexpr int kFirstBarrier = 3;  // after those of the consumers' turns
    cutlass::arch::NamedBarrier::sync(128, kFirstBarrier + warpgroup);
  }
};

}  // namespace sparse_fmha::sm90
