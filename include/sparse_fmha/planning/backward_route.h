// Which problems the backward kernel of all gradients takes, where there is one.
#pragma once

#include <cmath>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

// Why the gradients of a neighborhood take two kernels, or nullptr.
inline char const* why_two_kernels(Neighborhood::Params const& p, int32_t extra_len) {
  // Sums of dQ are cleared and rounded once a query, which the products saved for some hundred keys
  // outweigh (docs/lab/2026-11-29-fused-backward.md).
  constexpr int64_t kFewestKeys = 512;
  if (volume(p.window) + extra_len < kFewestKeys) {
    return "a query sees fewer than 512 keys";
  }
  if (extra_len > 0 && volume(p.dilation) > 1) {
    return "extra tokens have other query tiles than a dilated grid";
  }
  return nullptr;
}

// The same for block lists. With smaller blocks a key tile meets queries that list little of it: 64
// keys take as long either way.
inline char const* why_two_kernels(BlockSparse::Params const& p) {
  return p.block_kv < 128 ? "blocks have fewer than 128 keys" : nullptr;
}

// The same for lists of what kept tiles consist of: their blocks are small, but listed together.
inline char const* why_two_kernels_of_kept(FmhaProblem const& p) {
  constexpr double kSmallestScale = 1e-20;
  return std::abs(p.scale) <= kSmallestScale ? "the kernel divides by the scale" : nullptr;
}

inline char const* why_two_kernels(FmhaProblem const& p) {
  if (char const* const reason = why_two_kernels_of_kept(p)) {
    return reason;
  }
  if (auto const* const on_grid = std::get_if<Neighborhood::Params>(&p.sparsity)) {
    return why_two_kernels(*on_grid, p.extra_len);
  }
  auto const* const lists = std::get_if<BlockSparse::Params>(&p.sparsity);
  return lists != nullptr && p.kept_blocks == nullptr ? why_two_kernels(*lists) : nullptr;
}

}  // namespace sparse_fmha
