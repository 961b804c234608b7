// What a block of the kernel of all gradients is at, and which part of its tile a warp has, from
// step to step: kept in registers, or found again where they do not hold it.
#pragma once

#include <new>
#include <type_traits>

#include "sparse_fmha/sm80/backward/products.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Work>
class KeptPlace {
 public:
  // `room`: of FoundPlace.
  __device__ __forceinline__ KeptPlace(Work const& work, char* /*room*/) : work_(work) {}
  __device__ __forceinline__ Work const& work() const { return work_; }
  __device__ __forceinline__ WarpPart<Traits> const& warp() const { return warp_; }
  // Of the block's warps.
  __device__ __forceinline__ bool in_first_half() const {
    return warp_.rows < Traits::kRowWarps / 2;
  }

 private:
  Work const& work_;
  WarpPart<Traits> const warp_;
};

// work() is read from shared memory, once all threads have synchronized.
template <class Traits, class Work>
class FoundPlace {
 public:
  __device__ __forceinline__ FoundPlace(Work const& work, char* room) : room_(room) {
    if (threadIdx.x == 0) {
      new (room) Work(work);
    }
  }
  __device__ __forceinline__ Work const& work() const {
    return *reinterpret_cast<Work const*>(room_);
  }
  __device__ __forceinline__ WarpPart<Traits> warp() const {
    return WarpPart<Traits>(thread_again());
  }
  __device__ __forceinline__ bool in_first_half() const {
    return thread_again() < Traits::kThreads / 2;
  }

 private:
  char* room_;
};

template <class Traits, class Work>
using PlaceOf =
    std::conditional_t<Traits::kFindsAgain, FoundPlace<Traits, Work>, KeptPlace<Traits, Work>>;

}  // namespace sparse_fmha::sm80
