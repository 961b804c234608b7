// What the products of a dK/dV consumer read and write: accumulators, and tiles of shared memory as
// operands.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct DkvOperands {
  using Element = typename Traits::Element;
  using MmaScores = typename Traits::MmaScores;
  using MmaGradient = typename Traits::MmaGradient;

  static __device__ __forceinline__ auto new_gradient() {
    return cute::partition_fragment_C(MmaGradient{},
                                      cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{});
  }
  static __device__ __forceinline__ auto new_scores() {
    return cute::partition_fragment_C(MmaScores{},
                                      cute::Shape<cute::_64, cute::Int<Traits::kTileQ>>{});
  }
  // 64 keys or values of a tile.
  static __device__ __forceinline__ auto rows_of(Element* tile, int part) {
    using namespace cute;
    return local_tile(make_tensor(make_smem_ptr(tile), typename Traits::LayoutKeys{}),
                      Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(part, _0{}));
  }
  // The same as operand A: descriptors, or registers that are still to be filled.
  static __device__ __forceinline__ auto keys(Element* tile, int part) {
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_A(rows_of(tile, part));
  }
  template <class Operand>
  static __device__ __forceinline__ void load_registers(Element* tile, int part, Operand& operand) {
    using namespace cute;
    if constexpr (Traits::kKeysInRegisters) {
      auto copy_in = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, MmaScores{});
      auto thread_copy = copy_in.get_slice(threadIdx.x % 128);
      auto rows = as_position_independent_swizzle_tensor(rows_of(tile, part));
      cute::copy(copy_in, thread_copy.partition_S(rows), thread_copy.retile_D(operand));
    }
  }
  // The descriptors of all slices of both operands need too many registers. A false dependence on
  // the step's index makes the compiler recompute them in each step.
  template <class Operand>
  static __device__ __forceinline__ decltype(auto) anew(Operand& operand, int i) {
    if constexpr (Traits::kKeysInRegisters) {
      return (operand);
    } else {
      return cute::make_tensor(operand.data() + (i >> 28), operand.layout());
    }
  }
  // All stages of queries or dO, as operand B of the scores and of the gradients.
  static __device__ __forceinline__ auto rows(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRows{});
    return MmaScores{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }
  static __device__ __forceinline__ auto rows_t(Element* stages) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(stages), typename Traits::LayoutRowsT{});
    return MmaGradient{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
  }
};

// Marks an accumulator's contents as dead. Otherwise the fences around products keep it in
// registers.
template <class Accumulator>
__device__ __forceinline__ void forget(Accumulator& accumulator) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(accumulator); ++i) {
    asm volatile("" : "=f"(accumulator(i)));
  }
}

}  // namespace sparse_fmha::sm90
