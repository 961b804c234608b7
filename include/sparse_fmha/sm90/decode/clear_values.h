// Values of keys that no row sees, in a stage that was copied in boxes.
#pragma once

#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/decode/storage.h"

namespace sparse_fmha::sm90 {

// Of a worker's consumer warps.
__device__ __forceinline__ void sync_consumer(int worker) {
  constexpr int kFirstBarrier = 1;
  cutlass::arch::NamedBarrier::sync(128, kFirstBarrier + worker);
}

// Zeroes the values of the keys that no row sees: two threads to a row. A weight of zero does not
// make a number of NaN.
template <class Traits>
__device__ __forceinline__ void clear_hidden_row(typename Traits::Element* stage, bool hidden,
                                                 int worker) {
  if (hidden) {
    int const row = threadIdx.x % 128 / 2;
    CUTE_NO_UNROLL
    for (int column = threadIdx.x % 2 * 8; column < Traits::kHeadDim; column += 16) {
      *reinterpret_cast<uint4*>(stage + swizzled_place(row, column, Traits::kTileK)) = {0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  sync_consumer(worker);
}

}  // namespace sparse_fmha::sm90
