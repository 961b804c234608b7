// dQ of a query tile in a dK/dV kernel: the gradients of scores that consumers publish, times the
// keys, added to fp32 sums in memory. The order of additions differs from run to run.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/backward/dkv/traits.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct AddDq {
  using Mma = typename Traits::MmaDq;
  using State = RingState<Traits::kStages>;

  DkvParams<Geometry, Mechanism> const& params;
  DkvStorageWithDq<Traits, Geometry>& smem;
  Geometry const& geometry;

  static __device__ __forceinline__ auto new_sums() {
    return cute::partition_fragment_C(Mma{},
                                      cute::Shape<cute::_64, cute::Int<Traits::kDqColumns>>{});
  }

  // Issues the product of all keys of the tile with columns from part * kDqColumns on.
  template <class Sums>
  __device__ __forceinline__ void issue(Sums& sums, int part, State const& state) const {
    using namespace cute;
    auto const mma = Mma{}.get_slice(threadIdx.x % 128);
    auto const grads = mma.partition_fragment_A(
        make_tensor(make_smem_ptr(smem.grads), typename Traits::LayoutGradsT{}));
    auto const keys = make_tensor(make_smem_ptr(smem.k), typename Traits::LayoutKeysT{});
    auto a = grads(_, _, _, state.index);
    auto const b = mma.partition_fragment_B(local_tile(
        keys, Shape<Int<Traits::kDqColumns>, Int<Traits::kTileK>>{}, make_coord(part, _0{})));
    issue_mma<false, Traits::kTileK / 16>(Mma{}, a, b, sums);
  }

  // Adds the columns from part * kDqColumns on. The copy runs on while the warpgroup computes.
  template <class Sums>
  __device__ __forceinline__ void add(Sums const& sums, int part, State const& state) const {
    bool const leads = threadIdx.x % 128 == 0;
    float4* const slab = smem.slabs[Traits::kDqByConsumers ? part : 0];
    if (leads) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the copy of the last sums
    }
    sync(part);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(sums); i += 4) {
      slab[i / 4 * 128 + threadIdx.x % 128] =
          make_float4(sums(i), sums(i + 1), sums(i + 2), sums(i + 3));
    }
    cutlass::arch::fence_view_async_shared();
    sync(part);
    int const first = part * Traits::kDqColumns;
    int const columns = min(Traits::kDqColumns, params.dq.head_dim - first);
    if (leads && columns > 0) {
      int64_t const tile = geometry.query_tile(smem.source(state));
      float4* const to = params.dq.data + (tile * params.dq.head_dim + first) / 8 * 128;
      asm volatile(
          "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
          "cp.async.bulk.commit_group;" ::"l"(to),
          "r"(cute::cast_smem_ptr_to_uint(slab)), "r"(columns / 8 * kGroupBytes)
          : "memory");
    }
  }
  // Shared memory must outlive the copies that read it.
  __device__ __forceinline__ void finish() const {
    if (threadIdx.x % 128 == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
  }

 private:
  static constexpr int kGroupBytes = 128 * sizeof(float4);  // of eight columns
  static constexpr int kFirstBarrier = 1 + Traits::kConsumers;
  static __device__ __forceinline__ void sync(int part) {
    cutlass::arch::NamedBarrier::sync(128, kFirstBarrier + (Traits::kDqByConsumers ? part : 0));
  }
};

}  // namespace sparse_fmha::sm90
