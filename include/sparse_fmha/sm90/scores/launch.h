// Host code: launches of the kernels that reduce scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "sparse_fmha/core/scores.h"
#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/device/kernel_row.h"
#include "sparse_fmha/sm90/common/persistent.h"
#include "sparse_fmha/sm90/scores/diagonals.h"
#include "sparse_fmha/sm90/scores/kernel.h"

namespace sparse_fmha::sm90 {

template <class Element, int HeadDim>
struct ScoreLaunch {
  static void run(ScoreReduction reduction, ScoreProblem const& p,
                  ExecutionContext const& context) {
    switch (reduction) {
      case ScoreReduction::kRows:
        return launch<RowSums<kRows>>(p, context);
      case ScoreReduction::kColumns:
        return launch<ColumnSums<kRows>>(p, context);
      case ScoreReduction::kBlockSums:
        return launch<Blocks<SumOfBlock, kRows>>(p, context);
      case ScoreReduction::kBlockMaxima:
        return launch<Blocks<MaximumOfBlock, kRows>>(p, context);
      case ScoreReduction::kDiagonals: {
        ScoreProblem by_tile = p;
        by_tile.parts = ceil_div(p.len_kv, kScoreTile);
        return launch<DiagonalSums, kScoreTile, /*kStages=*/1>(by_tile, context);
      }
    }
  }

 private:
  static constexpr int kRows = kHeldRows<HeadDim>;

  static CUtensorMap map_of(TensorView const& view, ScoreProblem const& p, int32_t length,
                            int32_t heads, int32_t rows) {
    return sequence_tensor_map(view, p.dtype, length, heads, p.batch, p.head_dim, rows);
  }

  template <class Reduction, int kHeld = kRows, int kStages = kScoreStages<HeadDim>>
  static void launch(ScoreProblem const& p, ExecutionContext const& context) {
    using Traits = ScoreTraits<Element, HeadDim, kHeld, kStages>;
    using Storage = ScoreStorage<Traits, typename Reduction::Shared>;
    static_assert(sizeof(Storage) <= Traits::kSmemLimit,
                  "the stages do not fit the shared memory of a Hopper block");
    constexpr bool kHoldsQueries = Reduction::Held::kQueries;
    CUtensorMap const q = map_of(p.q, p, p.len_q, p.heads_q, kHoldsQueries ? kHeld : kScoreTile);
    CUtensorMap const k = map_of(p.k, p, p.len_kv, p.heads_kv, kHoldsQueries ? kScoreTile : kHeld);
    int32_t const group = p.heads_q / p.heads_kv;
    int32_t const held = kHoldsQueries ? p.len_q : p.len_kv;
    double const streamed = kHoldsQueries ? double{1} * p.len_kv / group : double{1} * p.len_q;
    int64_t const tiles = int64_t{ceil_div(held, kHeld)} * p.parts;
    int64_t const blocks = tiles * p.heads_q * p.batch;
    if (blocks > INT32_MAX) {
      throw std::runtime_error(
          "sparse_fmha: thread blocks of a reduction of scores must be at most 2^31 - 1, got " +
          std::to_string(blocks));
    }
    ScoreParams params = {};
    params.held = kHoldsQueries ? q : k;
    params.streamed = kHoldsQueries ? k : q;
    params.scheduler = {nullptr,
                        static_cast<int32_t>(blocks),
                        static_cast<int32_t>(tiles),
                        p.heads_q,
                        p.heads_q * p.batch,
                        heads_in_cache(streamed * Traits::kHeadDim * sizeof(Element))};
    params.parts = p.parts;
    params.heads_per_kv = group;
    params.len_q = p.len_q;
    params.len_kv = p.len_kv;
    params.shift = p.causal ? p.len_kv - p.len_q : p.len_kv;
    // Zero would turn the -inf of a hidden score into NaN.
    params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
    params.negate = p.scale < 0;
    params.lse = p.lse;
    params.block_q = p.block_q;
    params.block_kv = p.block_kv;
    params.result = p.result;

    auto* const kernel = &reduce_scores<Traits, Reduction>;
    static OncePerDevice raise_limit;
    raise_limit([&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(Storage)),
                 "raising the shared-memory limit");
    });
    kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, sizeof(Storage),
             static_cast<cudaStream_t>(context.stream)>>>(params);
    check_cuda(cudaGetLastError(), "launching a reduction of scores");
  }
};

template <class Element, int HeadDim>
ScoreKernels score_kernels(char const* name) {
  return {name, Arch::kSm90, device::data_type(Element{}), HeadDim,
          &ScoreLaunch<Element, HeadDim>::run};
}

}  // namespace sparse_fmha::sm90
