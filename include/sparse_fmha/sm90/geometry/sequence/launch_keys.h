// Launches of dK/dV kernels on one axis of tokens.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/backward/dkv/run_kernel.h"
#include "sparse_fmha/sm90/geometry/sequence/keys.h"

namespace sparse_fmha::sm90 {

template <class Traits>
KeyCopies<Traits> key_copies(FmhaProblem const& p) {
  Gradients const& g = *p.gradients;
  int64_t const len_q = volume(p.grid_q);
  int64_t const len_kv = volume(p.grid_kv);
  auto map_q = [&](TensorView const& view, int32_t dim) {
    return sequence_tensor_map(view, p.dtype, len_q, p.heads_q, p.batch, dim, Traits::kTileQ);
  };
  auto map_kv = [&](TensorView const& view, int32_t dim, int rows) {
    return sequence_tensor_map(view, p.dtype, len_kv, p.heads_kv, p.batch, dim, rows);
  };
  int64_t const row = int64_t{4} * p.heads_q;
  return {map_kv(p.k, p.head_dim, Traits::kTileK),
          map_kv(p.v, p.value_dim, Traits::kTileK),
          map_q(p.q, p.head_dim),
          map_q(g.out, p.value_dim),
          row_terms_map<3>(g.row_terms, {MapAxis{len_q, row, Traits::kTileQ}, MapAxis{p.heads_q, 4},
                                         MapAxis{p.batch, len_q * row}}),
          map_kv(g.k, p.head_dim, 64),
          map_kv(g.v, p.value_dim, 64)};
}

// Key heads that blocks work on at a time.
template <class Traits, class Mechanism>
inline constexpr int kSideBySide = std::is_same_v<Mechanism, Dense> ? 4
                                   : Traits::kAddsDq                ? 8
                                                                    : 16;

template <class Traits, class Mechanism>
void SequenceKeys<Traits, Mechanism>::launch(FmhaProblem const& p,
                                             ExecutionContext const& context) {
  DkvParams<SequenceKeys, Mechanism> params;
  params.geometry = key_copies<Traits>(p);
  params.bias = bias_params(p);
  params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  int32_t const key_tiles = Mechanism::num_key_tiles(params.sparsity, Traits::tile_shape());
  params.scheduler = make_scheduler(p.heads_kv, p.batch, key_tiles, kSideBySide<Traits, Mechanism>);
  with_query_sums<Traits>(params, p, device::sum_tiles(p), context,
                          [&] { run_dkv_kernel<Traits>(params, p, context); });
}

}  // namespace sparse_fmha::sm90
