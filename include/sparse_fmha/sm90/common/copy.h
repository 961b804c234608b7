// TMA copies into stages.
#pragma once

#include <cuda.h>

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

// L2 cache policies, as the TMA instructions encode them.
inline constexpr auto kReadOnce = cute::TMA::CacheHintSm90::EVICT_FIRST;
inline constexpr auto kReadByMany = cute::TMA::CacheHintSm90::EVICT_LAST;

// Copies the box at `place` (the coordinates after the head dimension), 64 columns at a time.
// `rows`: rows of the shared-memory tile that holds the box.
template <int kHeadDim, class Element, class... Place>
__device__ __forceinline__ void load_box(CUtensorMap const& map, FullBarrier& barrier,
                                         Element* destination, int rows,
                                         cute::TMA::CacheHintSm90 hint, Place... place) {
  static_assert(sizeof...(Place) == 3 || sizeof...(Place) == 4, "tensors of rank 4 or 5");
  using Load =
      std::conditional_t<sizeof...(Place) == 3, cute::SM90_TMA_LOAD_4D, cute::SM90_TMA_LOAD_5D>;
  CUTE_UNROLL
  for (int d = 0; d < kHeadDim; d += 64) {
    Load::copy(&map, reinterpret_cast<uint64_t*>(&barrier), static_cast<uint64_t>(hint),
               destination + d * rows, d, place...);
  }
}

}  // namespace sparse_fmha::sm90
