// Operands of a consumer warpgroup's matrix products.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// The warpgroup's 64 rows of the query tile.
template <class Traits>
__device__ __forceinline__ auto operand_q(typename Traits::Element* q, int warpgroup) {
  using namespace cute;
  auto tile = local_tile(make_tensor(make_smem_ptr(q), typename Traits::LayoutQ{}),
                         Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(warpgroup, _0{}));
  return typename Traits::MmaQK{}.get_slice(threadIdx.x % 128).partition_fragment_A(tile);
}

// All stages of keys, and of values.
template <class Traits>
__device__ __forceinline__ auto operand_k(typename Traits::Element* k) {
  auto tile = cute::make_tensor(cute::make_smem_ptr(k), typename Traits::LayoutK{});
  return typename Traits::MmaQK{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
}
template <class Traits>
__device__ __forceinline__ auto operand_v(typename Traits::Element* v) {
  auto tile = cute::make_tensor(cute::make_smem_ptr(v), typename Traits::LayoutVt{});
  return typename Traits::MmaPV{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
}

// Weights in registers: the accumulator of Q.K has the register layout of operand A of P.V.
template <class Traits>
using Weights = decltype(cute::make_tensor<typename Traits::Element>(
    cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                             cute::Int<Traits::kTileK / 16>>>{}));

}  // namespace sparse_fmha::sm90
