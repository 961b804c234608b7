#include "sparse_fmha/cpu/tiles.h"

namespace sparse_fmha::cpu {
TileShape choose_tiles(FmhaProblem const& problem, int) {
  if (problem.sparsity.index() < 2) return {{1, 1, 128}, {1, 1, 64}};
  return {{1, 8, 8}, {1, 8, 8}};
}
int32_t num_query_tiles(FmhaProblem const& problem, TileShape const& shape) {
  int32_t n = 0;
  if (auto* d = std::get_if<0>(&problem.sparsity)) n = Dense::num_query_tiles(*d, shape);
  if (auto* d = std::get_if<1>(&problem.sparsity)) n = Causal::num_query_tiles(*d, shape);
  if (auto* d = std::get_if<2>(&problem.sparsity)) n = Neighborhood::num_query_tiles(*d, shape);
  return n;
}
}  // namespace sparse_fmha::cpu
