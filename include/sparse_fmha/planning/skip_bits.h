// The size of FmhaProblem::skip_bits.
#pragma once

#include <algorithm>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/planning/interleaved.h"

namespace sparse_fmha {

struct SkipSizes {
  int32_t groups;  // of 64 query rows
  int32_t words;   // 32 tiles each
};

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
inline int32_t words_for(int64_t tiles) { return static_cast<int32_t>((tiles + 31) / 32); }

// Of a neighborhood, by the tiles of a kernel for this head dim. Others do not depend on these.
inline SkipSizes skip_sizes(FmhaProblem const& p, int32_t tile_k, int32_t head_dim) {
  if (auto const* const blocks = std::get_if<BlockSparse::Params>(&p.sparsity)) {
    return {skip_groups(p), words_for(skip_tiles(*blocks))};
  }
  if (auto const* const stripes = std::get_if<Stripe::Params>(&p.sparsity)) {
    return {skip_groups(p), words_for(skip_tiles(*stripes))};
  }
  if (auto const* const windows = std::get_if<Neighborhood::Params>(&p.sparsity)) {
    constexpr int32_t kRows = 128;
    SkipSizes sizes = {0, 0};
    for (InterleavedGrid const& grid : interleaved_grids(*windows, kRows, tile_k, head_dim)) {
      sizes.groups += grid.groups;
      sizes.words = std::max(sizes.words, words_for(most_tiles(grid, p.extra_len)));
    }
    return sizes;
  }
  return {skip_groups(p), skip_words(p)};
}

}  // namespace sparse_fmha
