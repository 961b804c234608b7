// How a warp walks over its tiles: it copies them ahead, and adds up what its rows see of them.
#pragma once

#include "sparse_fmha/device/decode/finish.h"
#include "sparse_fmha/device/decode/piece_keys.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm80/forward/products.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/decode/few_rows/params.h"
#include "sparse_fmha/sm90/decode/few_rows/storage.h"

namespace sparse_fmha::sm90 {

// The queries of a group as operands of mma.sync, with the sign of the scale. Rows and columns that
// do not exist are zero.
template <class Traits>
class FewQueries {
 public:
  __device__ __forceinline__ FewQueries(DecodeParams const& params, DecodeParams::Group const& at,
                                        KeyRange rows) {
    int const lane = threadIdx.x % 32;
    uint32_t const sign = params.negate ? 0x80008000u : 0;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int32_t const row = rows.begin + lane / 4 + 8 * half;
      bool const there = row < rows.end;
      DecodeRow const from(params, at, there ? row : rows.begin);
      auto const* const data = static_cast<typename Traits::Element const*>(params.q.data) +
                               from.offset(params.q) + lane % 4 * 2;
      CUTE_UNROLL
      for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
        bool const reads = there && i * 8 < params.head_dim;
        uint32_t const x = reads ? *reinterpret_cast<uint32_t const*>(data + i * 8) : 0;
        step_[i / 2][i % 2 * 2 + half] = x ^ sign;
      }
    }
  }
  __device__ __forceinline__ void get(int s, int /*lane*/, uint32_t (&to)[4]) const {
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      to[r] = step_[s][r];
    }
  }

 private:
  uint32_t step_[Traits::kHeadDim / 16][4];
};

// The tiles of a warp: every kWarps-th of those of its block. Stages hold keys and values in turn,
// so that one is copied while the other is computed.
template <class Traits>
class FewRowsWalk {
 public:
  using Element = typename Traits::Element;
  using Stage = Element[Traits::kTileElements];
  using Output = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kHeadDim / 2>>{}));

  // `tiles`: from the warp's first to the end of the block's. `stages`, `full`: the warp's.
  __device__ __forceinline__ FewRowsWalk(FewRowsParams const& params, DecodePiece const& piece,
                                         PieceKeys const& keys, KeyRange rows, KeyRange tiles,
                                         Stage* stages, FullBarrier* full)
      : params_(params),
        piece_(piece),
        keys_(keys),
        rows_(rows),
        tiles_(tiles),
        stages_(stages),
        full_(full),
        next_(tiles.begin) {}

  // Copies what the stages hold.
  __device__ __forceinline__ void begin() {
    CUTE_UNROLL
    for (int item = 0; item < Traits::kStages; ++item) {
      item % 2 == 0 ? copy_keys(item) : copy_values(item);
    }
  }

  __device__ __forceinline__ void run(FewQueries<Traits> const& queries, OnlineSoftmax& softmax,
                                      Output& output) {
    RingState<Traits::kStages> state;
    auto const release = [&](auto copy) {
      __syncwarp();  // all lanes have read the stage
      copy(state.index);
      state.advance();
    };
    // Items 2i and 2i + 1 are keys and values of tile i. What replaces item n is item n + kStages.
    constexpr bool kSameKind = Traits::kStages % 2 == 0;
    auto const copy_values_or_keys = [&](int stage) {
      kSameKind ? copy_keys(stage) : copy_values(stage);
    };
    auto const copy_keys_or_values = [&](int stage) {
      kSameKind ? copy_values(stage) : copy_keys(stage);
    };
    CUTE_NO_UNROLL
    for (int32_t tile = tiles_.begin; tile < tiles_.end; tile += Traits::kWarps) {
      full_[state.index].wait(state.phase);
      auto scores = cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kTileK / 2>>{});
      sm80::multiply_keys<Traits>(queries, stages_[state.index], scores);
      release(copy_values_or_keys);
      Box const box = box_of(tile);
      if (is_masked(box)) {
        hide(box, scores);
      }
      float rescale[kRowsPerThread];
      if (softmax.template update<true>(scores, rescale)) {
        rescale_rows(output, rescale);
      }
      sm80::Weights<Traits> weights;
      weights.take(scores);
      full_[state.index].wait(state.phase);
      if (is_masked(box)) {
        clear_hidden(box, stages_[state.index]);
      }
      sm80::multiply_values<Traits>(weights, stages_[state.index], output);
      release(copy_keys_or_values);
    }
  }

 private:
  // A lane's box of a tile.
  struct Box {
    PieceKeys::Place place;
    bool wanted;  // some row may see a key
    bool whole;   // all rows see all keys
  };

  FewRowsParams const& params_;
  DecodePiece const& piece_;
  PieceKeys const& keys_;
  KeyRange const rows_;
  KeyRange const tiles_;
  Stage* const stages_;
  FullBarrier* const full_;
  int32_t next_;  // the tile that is copied next, or whose keys have been
  Box ahead_;     // of that tile

  __device__ __forceinline__ bool has_box() const {
    return threadIdx.x % 32 < Traits::kTileK / params_.box;
  }
  __device__ __forceinline__ Box box_of(int32_t tile) const {
    int64_t const slot = int64_t{tile} * Traits::kTileK + threadIdx.x % 32 * params_.box;
    PieceKeys::Place const place = keys_.place_of(has_box() ? keys_.position(slot) : -1);
    bool const exists = keys_.exists(place);
    return {place, exists && keys_.some_row_may_see(place.position, params_.box),
            exists && keys_.all_rows_see(place.position, params_.box)};
  }
  __device__ __forceinline__ bool is_masked(Box const& box) const {
    return __any_sync(0xffffffff, has_box() && !box.whole);
  }

  __device__ __forceinline__ void copy_keys(int stage) {
    if (next_ < tiles_.end) {
      ahead_ = box_of(next_);
      copy(params_.k_map, stage);
    }
  }
  __device__ __forceinline__ void copy_values(int stage) {
    if (next_ < tiles_.end) {
      copy(params_.v_map, stage);
      next_ += Traits::kWarps;
    }
  }
  // A lane for each box.
  __device__ __forceinline__ void copy(CUtensorMap const& map, int stage) const {
    if (threadIdx.x % 32 == 0) {
      full_[stage].arrive_and_expect_tx(sizeof(Stage));
    }
    __syncwarp();
    if (has_box()) {
      // A box that no row sees is read from beyond the last page: zeros, and no memory traffic.
      load_box<Traits::kHeadDim>(
          map, full_[stage], stages_[stage] + threadIdx.x % 32 * params_.box * 64, Traits::kTileK,
          cute::TMA::CacheHintSm90::EVICT_NORMAL, ahead_.place.row, piece_.at.head,
          ahead_.wanted ? ahead_.place.outer : INT32_MAX);
    }
  }

  // The position of a slot of a tile, or -1.
  __device__ __forceinline__ int32_t position(Box const& box, int slot) const {
    int32_t const begin =
        __shfl_sync(0xffffffff, box.wanted ? box.place.position : -1, slot / params_.box);
    return begin < 0 ? -1 : begin + slot % params_.box;
  }
  // Hides keys from the rows that do not see them.
  template <class Scores>
  __device__ __forceinline__ void hide(Box const& box, Scores& scores) const {
    DecodeKeys const& all = params_.keys;
    KeyRange const range = all.range(piece_.at.batch, piece_.at.head);
    int const lane = threadIdx.x % 32;
    KeyRange seen[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = min_int(rows_.begin + lane / 4 + 8 * r, rows_.end - 1);
      seen[r] = all.visible(range, row / all.group);
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      int const r = AccumulatorPosition::row_of(i);
      int32_t const at = position(box, lane % 4 * 2 + AccumulatorPosition::column_of(i));
      scores(i) = at >= seen[r].begin && at < seen[r].end ? scores(i) : -INFINITY;
    }
  }
  // The values of keys that no row sees may be anything, and become zeros.
  __device__ __forceinline__ void clear_hidden(Box const& box, Element* values) const {
    CUTE_NO_UNROLL
    for (int first = 0; first < Traits::kTileK; first += 32) {
      int const slot = first + threadIdx.x % 32;
      int32_t const at = position(box, slot % Traits::kTileK);
      if (slot < Traits::kTileK && (at < 0 || !keys_.some_row_may_see(at))) {
        CUTE_NO_UNROLL
        for (int chunk = 0; chunk < Traits::kHeadDim / 8; ++chunk) {
          *reinterpret_cast<uint4*>(values + Traits::place(slot, chunk)) = {0, 0, 0, 0};
        }
      }
    }
    cutlass::arch::fence_view_async_shared();  // before the next copy into the stage
    __syncwarp();
  }
};

}  // namespace sparse_fmha::sm90
