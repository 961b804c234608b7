// Conversion of fp32 accumulators to 16 bits.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Converts fp32 registers to 16 bits. The layout stays.
template <class Element, class Source>
__device__ __forceinline__ auto convert(Source const& source) {
  constexpr int kSize = decltype(cute::size(source))::value;
  auto result = cute::make_tensor<Element>(source.layout());
  auto const* from = reinterpret_cast<cutlass::Array<float, kSize> const*>(source.data());
  auto* to = reinterpret_cast<cutlass::Array<Element, kSize>*>(result.data());
  *to = cutlass::NumericArrayConverter<Element, float, kSize>{}(*from);
  return result;
}

template <class Source, class Target>
__device__ __forceinline__ void convert_into(Source const& source, Target& target) {
  auto const rounded = convert<typename Target::value_type>(source);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(rounded); ++i) {
    target(i) = rounded(i);
  }
}

}  // namespace sparse_fmha::sm90
