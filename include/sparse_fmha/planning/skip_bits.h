// The size of FmhaProblem::skip_bits, which does not depend on the kernel.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

// Kernels by lists that skip have stages of at least as many keys.
inline constexpr int32_t kSkipStage = 32;

// The most tiles that 64 query rows visit.
inline int64_t skip_tiles(BlockSparse::Params const& p) {
  // The blocks of both halves of a query tile and those of one half each end with a ragged stage.
  int64_t const keys = (int64_t{p.full.width} + p.partial.width) * p.block_kv;
  return (keys + kSkipStage - 1) / kSkipStage + 1;
}
inline int64_t skip_tiles(Stripe::Params const& p) {
  return int64_t{p.ranges.width} * (p.range_size / kSkipStage) +
         ceil_div(p.columns.width, kSkipStage);
}
// Words of 32 tiles, of any mechanism.
inline int32_t skip_words_of(FmhaProblem const& p) {
  auto words = [](int64_t tiles) { return static_cast<int32_t>((tiles + 31) / 32); };
  if (auto const* const blocks = std::get_if<BlockSparse::Params>(&p.sparsity)) {
    return words(skip_tiles(*blocks));
  }
  if (auto const* const stripes = std::get_if<Stripe::Params>(&p.sparsity)) {
    return words(skip_tiles(*stripes));
  }
  return skip_words(p);
}

}  // namespace sparse_fmha
