// The producer of a decode kernel: copies keys and values of a piece, tile by tile. The form of the
// keys decides where a row is; nothing after the producer depends on it.
//
// Where runs of 16 or more slots are consecutive rows of a page, one warp copies keys, and one
// values, in boxes with TMA. Otherwise both warps gather single rows with cp.async.
#pragma once

#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/decode/pieces.h"
#include "sparse_fmha/sm90/decode/storage.h"

namespace sparse_fmha::sm90 {

// The slots of a piece, and what its rows see of them.
class PieceKeys {
 public:
  __device__ __forceinline__ PieceKeys(DecodeParams const& params, DecodePiece const& piece)
      : keys_(params.keys), at_(piece.at), range_(keys_.range(at_.batch, at_.head)) {
    KeyRange const rows = keys_.rows_of(at_.row_group);
    first_query_ = rows.begin / keys_.group;
    last_query_ = (rows.end - 1) / keys_.group;
    // Both ends of what queries see grow with the query, or are the same for all.
    KeyRange const first = keys_.visible(range_, first_query_);
    KeyRange const last = keys_.visible(range_, last_query_);
    some_see_ = {first.begin, last.end};
    all_see_ = {last.begin, first.end};
    if (keys_.tree.data != nullptr) {
      all_see_.end = min_int(all_see_.end, range_.end - keys_.len_q);
    }
    slots_ = keys_.slots(range_, at_.batch, first_query_, at_.head);
  }

  // The position of a slot, or -1 if there is none.
  __device__ __forceinline__ int32_t position(int64_t slot) const {
    return slot < slots_ ? keys_.position(range_, at_.batch, first_query_, at_.head,
                                          static_cast<int32_t>(slot))
                         : -1;
  }
  // Of the positions [begin, begin + count): whether all rows see all, and some row may see some.
  __device__ __forceinline__ bool all_rows_see(int32_t begin, int32_t count = 1) const {
    return begin >= all_see_.begin && int64_t{begin} + count <= all_see_.end;
  }
  __device__ __forceinline__ bool some_row_may_see(int32_t begin, int32_t count = 1) const {
    return begin < some_see_.end && int64_t{begin} + count > some_see_.begin;
  }
  __device__ __forceinline__ bool some_row_sees(int32_t position) const {
    bool seen = some_row_may_see(position);
    if (keys_.tree.data != nullptr && seen) {
      seen = false;
      CUTE_NO_UNROLL
      for (int32_t query = first_query_; query <= last_query_ && !seen; ++query) {
        seen = keys_.in_tree(range_, at_.batch, query, position);
      }
    }
    return seen;
  }

  struct Place {
    int32_t position;  // or -1
    int32_t outer;     // batch entry or page
    int32_t row;       // in it
  };
  __device__ __forceinline__ Place place_of(int32_t position) const {
    if (position < 0 || keys_.page == 0) {
      return {position, at_.batch, position};
    }
    return {position, keys_.page_table.at(at_.batch, 0, at_.head, position / keys_.page),
            position % keys_.page};
  }
  // Uses what place_of() loaded.
  __device__ __forceinline__ bool exists(Place const& place) const {
    bool const has_page = place.outer >= 0 && place.outer < keys_.pages;
    return place.position >= 0 && (keys_.page == 0 || has_page);
  }

 private:
  DecodeKeys const& keys_;
  DecodeParams::Group const at_;
  KeyRange const range_;
  int32_t first_query_, last_query_, slots_;
  KeyRange some_see_, all_see_;
};

// What a warp that copies values knows of the tiles that are kept, in kernels with votes.
template <class Traits>
struct KeptValues {
  RingState<Traits::kValueStages> state = {};
  VoteQueue::State votes = {};

  // Waits for the vote on the next tile; returns whether it is kept.
  __device__ __forceinline__ bool take_vote(DecodeWorker<Traits>& smem) {
    return smem.votes.queue.get(votes) != 0;
  }
};

// Two warps, one for keys and one for values: a lane for each box of a tile.
template <class Traits>
struct BoxProducer {
  static constexpr int kArrivals = 1;  // at a full barrier

  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const warp;  // of the worker
  RingState<Traits::kStages> state = {};
  KeptValues<Traits> kept = {};

  __device__ __forceinline__ void load(DecodePiece const& piece) {
    PieceKeys const keys(params, piece);
    int const lane = threadIdx.x % 32;
    int const boxes = Traits::kTileK / params.box;
    auto look_up = [&](int32_t tile) {
      bool const mine = lane < boxes && tile < piece.tiles.end;
      return keys.place_of(mine ? keys.position(int64_t{tile} * Traits::kTileK + lane * params.box)
                                : -1);
    };
    // The first turn only looks up: the code stands once, since cold code is slow.
    PieceKeys::Place box = {};
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin - 1; tile < piece.tiles.end; ++tile) {
      if (tile >= piece.tiles.begin) {
        copy_tile(keys, piece, box, boxes);
      }
      box = look_up(tile + 1);  // its page arrives while a stage is waited for
    }
  }

 private:
  __device__ __forceinline__ void copy_tile(PieceKeys const& keys, DecodePiece const& piece,
                                            PieceKeys::Place const& box, int boxes) {
    int const lane = threadIdx.x % 32;
    bool const exists = keys.exists(box);
    bool const wanted = exists && keys.some_row_may_see(box.position, params.box);
    // A box that no row sees is read from beyond the last page: zeros, and no memory traffic.
    int32_t const outer = wanted ? box.outer : INT32_MAX;
    if (warp == 0) {
      bool const full = __all_sync(
          0xffffffff, lane >= boxes || (exists && keys.all_rows_see(box.position, params.box)));
      smem.ring_k.acquire(state);
      compiler_fence();
      if (!full) {
        write_positions(keys, wanted ? box.position : -1);
      }
      if (lane < kProducerWarps) {
        smem.set_masked(state.index, lane, !full);
      }
      compiler_fence();
      __syncwarp();
      copy(params.k_map, smem.ring_k, state, smem.keys(state.index), piece.at.head, boxes, box.row,
           outer);
    } else if constexpr (!Traits::kVotes) {
      smem.ring_v.acquire(state);
      copy(params.v_map, smem.ring_v, state, smem.values(state.index), piece.at.head, boxes,
           box.row, outer);
    } else if (kept.take_vote(smem)) {
      smem.ring_v.acquire(kept.state);
      copy(params.v_map, smem.ring_v, kept.state, smem.values(kept.state.index), piece.at.head,
           boxes, box.row, outer);
      kept.state.advance();
    }
    state.advance();
  }

  // `begin`: the position that the lane's box begins with, or -1.
  __device__ __forceinline__ void write_positions(PieceKeys const& keys, int32_t begin) const {
    CUTE_NO_UNROLL
    for (int slot = threadIdx.x % 32; slot < Traits::kTileK; slot += 32) {
      int32_t const of_box = __shfl_sync(0xffffffff, begin, slot / params.box);
      int32_t const position = of_box + slot % params.box;
      bool const seen = of_box >= 0 && keys.some_row_sees(position);
      smem.set_position(state.index, slot, seen ? position : -1);
    }
  }
  __device__ __forceinline__ cute::TMA::CacheHintSm90 hint() const {
    return params.fits_cache ? kReadOnce : cute::TMA::CacheHintSm90::EVICT_NORMAL;
  }
  template <int kStages>
  __device__ __forceinline__ void copy(CUtensorMap const& map, Ring<kStages>& ring,
                                       RingState<kStages> const& to,
                                       typename Traits::Element* stage, int32_t head, int boxes,
                                       int32_t row, int32_t outer) const {
    int const lane = threadIdx.x % 32;
    if (lane == 0) {
      ring.expect(to, Traits::kBytesK);
    }
    __syncwarp();
    if (lane < boxes) {
      load_box<Traits::kHeadDim>(map, ring.full[to.index], stage + lane * params.box * 64,
                                 Traits::kTileK, hint(), row, head, outer);
    }
  }
};

// Two warps: each copies 32 rows of a tile, four at a time, eight lanes to a row.
template <class Traits>
struct RowProducer {
  using Element = typename Traits::Element;
  static constexpr int kRowsOfWarp = 32;
  static constexpr int kLanes = kProducerWarps * 32;
  static constexpr int kArrivalsK = 2 * kLanes;  // positions, and copies
  static constexpr int kArrivalsV = kLanes;
  static_assert(Traits::kTileK == kProducerWarps * kRowsOfWarp, "a lane looks up one row");

  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const warp;  // of the worker
  RingState<Traits::kStages> state = {};
  KeptValues<Traits> kept = {};

  __device__ __forceinline__ void load(DecodePiece const& piece) {
    PieceKeys const keys(params, piece);
    int const lane = threadIdx.x % 32;
    int const first_row = warp * kRowsOfWarp;
    auto look_up = [&](int32_t tile) {
      int64_t const slot = int64_t{tile} * Traits::kTileK + first_row + lane;
      int32_t const position = tile < piece.tiles.end ? keys.position(slot) : -1;
      return keys.place_of(keys.some_row_sees(position) ? position : -1);
    };
    PieceKeys::Place next = look_up(piece.tiles.begin);
    [[maybe_unused]] PieceKeys::Place ahead[Traits::kKeysAhead] = {};  // no votes yet
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin; tile < piece.tiles.end; ++tile, state.advance()) {
      PieceKeys::Place const row = next;
      next = look_up(tile + 1);  // its page arrives while this tile is copied
      bool const exists = keys.exists(row);
      bool const full = __all_sync(0xffffffff, exists && keys.all_rows_see(row.position));
      smem.ring_k.acquire(state);
      compiler_fence();
      smem.set_position(state.index, first_row + lane, exists ? row.position : -1);
      smem.set_masked(state.index, warp, !full);
      copy_rows(params.k, piece.at.head, row, exists, first_row, smem.keys(state.index));
      arrive_when_gathered(smem.ring_k.full[state.index]);
      compiler_fence();
      smem.ring_k.full[state.index].arrive();  // what the mask needs is written
      if constexpr (Traits::kVotes) {
        if (tile - piece.tiles.begin >= Traits::kKeysAhead) {
          copy_if_kept(keys, piece.at.head, ahead[0], first_row);
        }
        put_last(ahead, row);
      } else {
        smem.ring_v.acquire(state);
        copy_rows(params.v, piece.at.head, row, exists, first_row, smem.values(state.index));
        arrive_when_gathered(smem.ring_v.full[state.index]);
      }
    }
    if constexpr (Traits::kVotes) {
      int32_t const tiles = piece.tiles.end - piece.tiles.begin;
      CUTE_NO_UNROLL
      for (int i = 0; i < Traits::kKeysAhead; ++i) {
        if (tiles + i >= Traits::kKeysAhead) {
          copy_if_kept(keys, piece.at.head, ahead[0], first_row);
        }
        put_last(ahead, ahead[0]);
      }
    }
  }

 private:
  static __device__ __forceinline__ void put_last(PieceKeys::Place (&ahead)[Traits::kKeysAhead],
                                                  PieceKeys::Place const& place) {
    PieceKeys::Place const last = place;
    CUTE_UNROLL
    for (int i = 0; i + 1 < Traits::kKeysAhead; ++i) {
      ahead[i] = ahead[i + 1];
    }
    ahead[Traits::kKeysAhead - 1] = last;
  }
  __device__ __forceinline__ void copy_if_kept(PieceKeys const& keys, int32_t head,
                                               PieceKeys::Place const& row, int first_row) {
    if (kept.take_vote(smem)) {
      smem.ring_v.acquire(kept.state);
      copy_rows(params.v, head, row, keys.exists(row), first_row, smem.values(kept.state.index));
      arrive_when_gathered(smem.ring_v.full[kept.state.index]);
      kept.state.advance();
    }
  }
  // Rows that do not exist become zeros.
  __device__ __forceinline__ void copy_rows(TensorView const& from, int32_t head,
                                            PieceKeys::Place const& row, bool exists, int first_row,
                                            Element* stage) const {
    int const chunk = threadIdx.x % 8;
    int64_t const mine = exists ? row.outer * from.batch_stride +
                                      row.row * from.axis_stride[kGridAxes - 1] +
                                      head * from.head_stride
                                : -1;
#pragma unroll 2
    for (int i = 0; i < kRowsOfWarp; i += 4) {
      int const r = i + threadIdx.x % 32 / 8;
      int64_t const offset = __shfl_sync(0xffffffff, mine, r);
      auto const* const source = static_cast<Element const*>(from.data) + (offset < 0 ? 0 : offset);
      CUTE_UNROLL
      for (int d = 0; d < Traits::kHeadDim; d += 64) {
        int const column = d + chunk * 8;
        bool const reads = offset >= 0 && column < params.head_dim;
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            stage + swizzled_place(first_row + r, column, Traits::kTileK),
            source + (reads ? column : 0), reads);
      }
    }
  }
};

}  // namespace sparse_fmha::sm90
