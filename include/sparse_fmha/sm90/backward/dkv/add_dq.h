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

  // Adds the columns from part * kDqColumns on to a query tile.
  template <class Sums>
  __device__ __forceinline__ void add(Sums const& sums, int part, int64_t tile) const {
    int const first = part * Traits::kDqColumns;
    float4* const to = params.dq.data + (tile * params.dq.head_dim + first) / 8 * kGroup;
    if constexpr (Traits::kDqByConsumers) {
      copy(sums, part, to, params.dq.head_dim - first);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(sums); i += 4) {
        if (first + AccumulatorPosition::column_of(i) < params.dq.head_dim) {
          asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i / 4 * kGroup +
                                                                             threadIdx.x % 128),
                       "f"(sums(i)), "f"(sums(i + 1)), "f"(sums(i + 2)), "f"(sums(i + 3))
                       : "memory");
        }
      }
    }
  }

 private:
  static constexpr int kGroup = 128;  // numbers of four that hold eight columns

  // By way of shared memory, because the consumer would wait for its own reductions.
  template <class Sums>
  __device__ __forceinline__ void copy(Sums const& sums, int part, float4* to, int columns) const {
    bool const leads = threadIdx.x % 128 == 0;
    static_assert(sizeof(smem.slabs[0]) == sizeof(float) * 64 * Traits::kDqColumns);
    float4* const slab = smem.slabs[part];
    if (leads) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the copy before
    }
    sync(part);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(sums); i += 4) {
      slab[i / 4 * kGroup + threadIdx.x % 128] =
          make_float4(sums(i), sums(i + 1), sums(i + 2), sums(i + 3));
    }
    cutlass::arch::fence_view_async_shared();
    sync(part);
    if (leads && columns > 0) {
      int const groups = min(Traits::kDqColumns, columns) / 8;
      asm volatile(
          "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
          "cp.async.bulk.commit_group;" ::"l"(to),
          "r"(cute::cast_smem_ptr_to_uint(slab)), "r"(groups * kGroup * int{sizeof(float4)})
          : "memory");
    }
  }
  static __device__ __forceinline__ void sync(int part) {
    cutlass::arch::NamedBarrier::sync(128, 1 + Traits::kConsumers + part);
  }
};

}  // namespace sparse_fmha::sm90
