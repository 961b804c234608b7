// The queries of a warp of a decode kernel.
#pragma once

#include "sparse_fmha/device/decode/products.h"
#include "sparse_fmha/sm80/decode/traits.h"

namespace sparse_fmha::sm80 {

// Addresses in shared memory depend on the lane. ptxas keeps those of all steps in registers from
// tile to tile, unless the lane seems to be another one for each.
__device__ __forceinline__ int lane_of_tile() {
  uint32_t thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread % 32;
}

// A warp's queries: in registers, or in shared memory.
template <class Traits, bool kInRegisters = Traits::kQueriesInRegisters>
class Queries;

template <class Traits>
class Queries<Traits, true> : public MmaRows<Traits::kRowDim> {
 public:
  __device__ __forceinline__ explicit Queries(typename Traits::Element const* tile) {
    this->load(tile, static_cast<int>(threadIdx.x / 32 * 16));
  }
};

template <class Traits>
class Queries<Traits, false> {
 public:
  __device__ __forceinline__ explicit Queries(typename Traits::Element const* tile) : tile_(tile) {}
  __device__ __forceinline__ void get(int s, int lane, uint32_t (&to)[4]) const {
    load_matrices(
        tile_ + chunk_place<Traits::kRowDim>(threadIdx.x / 32 * 16 + lane % 16, 2 * s + lane / 16),
        to);
  }

 private:
  typename Traits::Element const* tile_;
};

}  // namespace sparse_fmha::sm80
