// Launches of mechanisms on one axis of tokens.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/sequence/sequence.h"

namespace sparse_fmha::sm90 {

// Keys and values of all heads stay in the L2 cache up to about this size.
constexpr double kBytesOfAllHeads = 40e6;

// The parameters of a mechanism, which may serve another one's problems, too.
template <class Mechanism>
typename Mechanism::Params sequence_sparsity(FmhaProblem const& p) {
  if constexpr (std::is_same_v<Mechanism, DenseOrCausal>) {
    auto const* const dense = std::get_if<Dense::Params>(&p.sparsity);
    return dense != nullptr ? DenseOrCausal::of(*dense)
                            : DenseOrCausal::of(std::get<Causal::Params>(p.sparsity));
  } else {
    return std::get<typename Mechanism::Params>(p.sparsity);
  }
}

template <class Traits, class Mechanism>
void Sequence<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  int64_t const len_q = volume(p.grid_q);
  int64_t const len_kv = volume(p.grid_kv);
  auto map = [&](TensorView const& view, int64_t length, int heads, int dim, int rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, dim, rows);
  };
  KernelParams<Sequence, Mechanism> params;
  params.geometry = {{},
                     map(p.k, len_kv, p.heads_kv, p.head_dim, Traits::kTileK),
                     map(p.v, len_kv, p.heads_kv, p.value_dim, Traits::kTileK),
                     map(Traits::output(p), len_q, p.heads_q, Traits::output_dim(p), 64),
                     Traits::row_values(p),
                     static_cast<int32_t>(len_q),
                     p.heads_q};
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    params.geometry.q[i] =
        map(Traits::queries(p, i), len_q, p.heads_q, Traits::query_dim(p, i), 64);
  }
  params.sparsity = sequence_sparsity<Mechanism>(p);
  int32_t const q_tiles = Mechanism::num_query_tiles(params.sparsity, Traits::tile_shape());
  bool const causal = std::holds_alternative<Causal::Params>(p.sparsity);
  bool const all_heads =
      2. * len_kv * (p.head_dim + p.value_dim) * p.heads_kv * p.batch <= kBytesOfAllHeads;
  // Measured (docs/lab/2026-11-30g-tiles-in-turns.md): causal tiles differ in weight, and so do
  // tiles that skip.
  FewWaves few;
  if constexpr (Traits::kPass == Pass::kForward) {
    few.own = causal ? 3 : 2;
    if (p.skip_threshold == nullptr && turns_balance(causal, q_tiles, all_heads)) {
      few.turns = kWavesInTurns;
    }
  }
  bool const turns = few.in_turns(int64_t{q_tiles} * p.heads_q * p.batch,
                                  Traits::kBlocks * multiprocessor_count());
  // Measured at 4k to 32k: groups of 16 heads where tiles differ in weight (with fewer, thread
  // blocks idle after the last group's heaviest tiles; with more, heads evict each other's keys
  // from the L2 cache), 4 where they do not.
  int32_t const side_by_side = std::is_same_v<Mechanism, Dense> ? 4 : 16;
  params.scheduler = make_scheduler(p.heads_q, p.batch, q_tiles,
                                    turns && all_heads ? p.heads_q * p.batch : side_by_side);
  run_kernel<Traits>(params, p, context, few);
}

}  // namespace sparse_fmha::sm90
