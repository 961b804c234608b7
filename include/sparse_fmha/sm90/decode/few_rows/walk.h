// How a warp walks over its tiles: it copies them ahead, and adds up what its rows see of them.
#pragma once

#include "sparse_fmha/device/decode/cap_scores.h"
#include "sparse_fmha/device/decode/finish.h"
#include "sparse_fmha/device/decode/products.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/decode/few_rows/keys.h"
#include "sparse_fmha/sm90/decode/few_rows/storage.h"

namespace sparse_fmha::sm90 {

// The queries of a group as operands of mma.sync, with the sign of the scale. Rows and columns that
// do not exist are zero.
template <class Traits>
class FewQueries : public MmaRows<Traits::kHeadDim> {
 public:
  __device__ __forceinline__ FewQueries(DecodeParams const& params, FewRowsKeys const& keys) {
    int const lane = threadIdx.x % 32;
    uint32_t const sign = params.negate ? 0x80008000u : 0;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int32_t const row = keys.rows.begin + lane / 4 + 8 * half;
      bool const there = row < keys.rows.end;
      DecodeRow const from(params, keys.at, there ? row : keys.rows.begin);
      auto const* const data = static_cast<typename Traits::Element const*>(params.q.data) +
                               from.offset(params.q) + lane % 4 * 2;
      CUTE_UNROLL
      for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
        bool const reads = there && i * 8 < params.head_dim;
        uint32_t const x = reads ? *reinterpret_cast<uint32_t const*>(data + i * 8) : 0;
        this->step[i / 2][i % 2 * 2 + half] = x ^ sign;
      }
    }
  }
};

template <class Traits>
struct FewRowsWalk {
  using Stage = FewRowsStage<Traits>;
  using Places = FewRowsPlaces<Traits>;
  using Output = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kHeadDim / 2>>{}));
  using Scores = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kTileK / 2>>{}));

  FewRowsParams const& params;
  FewRowsKeys const& keys;
  Stage* const stages;  // of the warp, as the next two
  Places* const places;
  FullBarrier* const full;

  // Copies the first of the tiles [first, end) that are kWarps apart.
  __device__ __forceinline__ void begin(int32_t first, int32_t end) const {
    CUTE_NO_UNROLL
    for (int i = 0; i < Traits::kStages; ++i) {
      if (first + i * Traits::kWarps < end) {
        copy(look_up(first + i * Traits::kWarps), i);
      }
    }
  }
  // Adds these tiles up.
  __device__ __forceinline__ void run(int32_t first, int32_t end, FewQueries<Traits> const& queries,
                                      OnlineSoftmax& softmax, Output& output) const {
    RingState<Traits::kStages> state;
    CUTE_NO_UNROLL
    for (int32_t tile = first; tile < end; tile += Traits::kWarps, state.advance()) {
      // Looked up early: its page arrives while this tile is added.
      int32_t const next = tile + Traits::kWarps * Traits::kStages;
      Box const box = look_up(next < end ? next : end - 1);
      full[state.index].wait(state.phase);
      add(stages[state.index], places[state.index], queries, softmax, output);
      __syncwarp();  // all lanes have read the stage
      if (next < end) {
        copy(box, state.index);
      }
    }
  }

 private:
  // A lane's box of a tile.
  struct Box {
    FewRowsKeys::Place place;
    bool wanted;  // some row may see a key
    bool masked;  // some row does not see all
  };

  __device__ __forceinline__ bool has_box() const {
    return threadIdx.x % 32 < Traits::kTileK >> params.box_log2;
  }
  __device__ __forceinline__ Box look_up(int32_t tile) const {
    int32_t const slot = tile * Traits::kTileK + (threadIdx.x % 32 << params.box_log2);
    bool const mine = has_box() && slot < keys.slots.end;
    FewRowsKeys::Place const place = mine ? keys.place_of(slot) : FewRowsKeys::Place{-1, 0, 0};
    return {place, keys.some_row_may_see(place.position, params.box),
            has_box() && !keys.all_rows_see(place.position, params.box)};
  }
  // A lane for each box.
  __device__ __forceinline__ void copy(Box const& box, int stage) const {
    int const lane = threadIdx.x % 32;
    bool const exists = keys.exists(box.place);
    bool const wanted = exists && box.wanted;
    bool const masked = __any_sync(0xffffffff, has_box() && (box.masked || !exists));
    if (lane == 0) {
      full[stage].arrive_and_expect_tx(sizeof(Stage));
      places[stage].masked = masked;
    }
    __syncwarp();
    if (has_box()) {
      places[stage].begin[lane] = wanted ? box.place.position : -1;
      // A box that no row sees is read from beyond the last page: zeros, and no memory traffic.
      int32_t const outer = wanted ? box.place.outer : INT32_MAX;
      auto const load = [&](CUtensorMap const& map, typename Traits::Element* to) {
        load_box<Traits::kHeadDim>(map, full[stage], to + (lane << params.box_log2) * 64,
                                   Traits::kTileK, cute::TMA::CacheHintSm90::EVICT_NORMAL,
                                   box.place.row, keys.at.head, outer);
      };
      load(params.k_map, stages[stage].keys);
      load(params.v_map, stages[stage].values);
    }
  }

  __device__ __forceinline__ void add(Stage& stage, Places const& at,
                                      FewQueries<Traits> const& queries, OnlineSoftmax& softmax,
                                      Output& output) const {
    Scores scores;
    multiply_keys<Traits>(queries, stage.keys, scores, threadIdx.x % 32);
    cap_scores(params, scores);
    if (at.masked) {
      hide(at, stage, scores);
    }
    float rescale[kRowsPerThread];
    if (softmax.template update<true>(scores, rescale)) {
      rescale_rows(output, rescale);
    }
    device::Weights<Traits> weights;
    weights.take(scores);
    multiply_values<Traits>(weights, stage.values, output, threadIdx.x % 32);
  }

  // The position of a slot of a tile, or -1.
  __device__ __forceinline__ int32_t position(Places const& of, int slot) const {
    int32_t const begin = of.begin[slot >> params.box_log2];
    return begin < 0 ? -1 : begin + (slot & (params.box - 1));
  }
  // Hides keys from the rows that do not see them. The values of keys that no row sees may be
  // anything, and become zeros.
  __device__ __forceinline__ void hide(Places const& of, Stage& stage, Scores& scores) const {
    int const lane = threadIdx.x % 32;
    KeyRange seen[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = min_int(keys.rows.begin + lane / 4 + 8 * r, keys.rows.end - 1);
      seen[r] = keys.all.visible(keys.range, row / keys.all.group);
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      int const r = AccumulatorPosition::row_of(i);
      int32_t const at = position(of, lane % 4 * 2 + AccumulatorPosition::column_of(i));
      scores(i) = at >= seen[r].begin && at < seen[r].end ? scores(i) : -INFINITY;
    }
    CUTE_NO_UNROLL
    for (int slot = lane; slot < Traits::kTileK; slot += 32) {
      int32_t const at = position(of, slot);
      if (at < 0 || !keys.some_row_may_see(at)) {
        CUTE_NO_UNROLL
        for (int chunk = 0; chunk < Traits::kHeadDim / 8; ++chunk) {
          *reinterpret_cast<uint4*>(stage.values + Traits::place(slot, chunk)) = {0, 0, 0, 0};
        }
      }
    }
    cutlass::arch::fence_view_async_shared();  // before the next copy into the stage
    __syncwarp();
  }
};

}  // namespace sparse_fmha::sm90
