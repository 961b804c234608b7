// The way of dK and dV from a consumer's registers to memory.
#pragma once

#include "sparse_fmha/sm90/backward/dkv/operands.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// kWantsDk, kWantsDv: what the consumer has.
template <class Traits, class Geometry, class Mechanism, bool kWantsDk, bool kWantsDv>
struct DkvEpilogue {
  using Element = typename Traits::Element;
  using Work = typename Geometry::Work;

  DkvParams<Geometry, Mechanism> const& params;
  StorageOf<Traits, Geometry>& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  int const part;       // which 64 keys of the tile

  // By way of shared memory. `state_keys` is that of the keys, which this releases.
  template <class Gradient>
  __device__ __forceinline__ void store(Gradient& dk, Gradient& dv, Work const& work,
                                        RingState<1> const& state_keys) const {
    if constexpr (kWantsDk) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(dk); ++i) {
        dk(i) *= params.scale;
      }
    }
    if constexpr (Traits::kAddsDq) {
      store_by_slab(dk, dv, work, state_keys);
    } else {
      store_over_keys(dk, dv, work, state_keys);
    }
  }

 private:
  // One after the other by way of the consumer's slab, while the next keys and values are loaded.
  template <class Gradient>
  __device__ __forceinline__ void store_by_slab(Gradient const& dk, Gradient const& dv,
                                                Work const& work,
                                                RingState<1> const& state_keys) const {
    using namespace cute;
    smem.ring_keys.release(state_keys);
    auto* const slab = reinterpret_cast<Element*>(smem.slabs[part]);
    auto const rows = make_tensor(
        make_smem_ptr(slab),
        tile_to_shape(typename Traits::RowMajorAtom{}, Shape<_64, Int<Traits::kHeadDim>>{}));
    auto store_one = [&](Gradient const& gradient, auto store) {
      if (threadIdx.x % 128 == 0) {
        tma_store_wait<0>();  // has read what was in the slab
      }
      sync_warpgroup();
      to_shared(gradient, rows);
      tma_store_fence();
      sync_warpgroup();
      if (threadIdx.x % 128 == 0) {
        store();
        tma_store_arrive();
      }
    };
    store_one(dv, [&] { geometry.store_dv(slab, work, part); });
    store_one(dk, [&] { geometry.store_dk(slab, work, part); });
  }

  // Over the keys and values.
  template <class Gradient>
  __device__ __forceinline__ void store_over_keys(Gradient const& dk, Gradient const& dv,
                                                  Work const& work,
                                                  RingState<1> const& state_keys) const {
    wait_for_reads(state_keys);
    if constexpr (kWantsDv) {
      to_shared(dv, DkvOperands<Traits>::rows_of(smem.v, part));
    }
    if constexpr (kWantsDk) {
      to_shared(dk, DkvOperands<Traits>::rows_of(smem.k, part));
    }
    cute::tma_store_fence();
    sync_warpgroup();
    if (threadIdx.x % 128 == 0) {
      if constexpr (kWantsDv) {
        geometry.store_dv(smem.v + part * 64 * 64, work, part);
      }
      if constexpr (kWantsDk) {
        geometry.store_dk(smem.k + part * 64 * 64, work, part);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
    sync_warpgroup();  // each warp releases the tile, once the store has read it
    smem.ring_keys.release(state_keys);
  }

  template <class Gradient, class Rows>
  __device__ __forceinline__ void to_shared(Gradient const& gradient, Rows const& rows) const {
    using namespace cute;
    auto copy_out =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaGradient{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    auto rounded = convert<Element>(gradient);
    cute::copy(copy_out, thread_copy.retile_S(rounded),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(rows)));
  }

  static constexpr int kFirstBarrier = 1;
  __device__ __forceinline__ void sync_warpgroup() const {
    cutlass::arch::NamedBarrier::sync(128, kFirstBarrier + warpgroup);
  }
  // Waits until all consumers that hold these keys have read them. Split roles are two
  // instantiations, so they meet at an mbarrier: a named barrier would be reached at two places of
  // the code.
  __device__ __forceinline__ void wait_for_reads(RingState<1> const& state_keys) const {
    if constexpr (Traits::kRoles == Roles::kSplit) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        smem.keys_read.arrive();
      }
      smem.keys_read.wait(state_keys.phase);
    } else {
      sync_warpgroup();
    }
  }
};

}  // namespace sparse_fmha::sm90
