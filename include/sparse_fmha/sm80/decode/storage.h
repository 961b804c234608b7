// Shared memory of a decode kernel, and what is copied to it.
#pragma once

#include <new>

#include "sparse_fmha/device/decode/piece_keys.h"
#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm80/decode/traits.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"

namespace sparse_fmha::sm80 {

// Where the keys of a tile lie. A copy adds an offset to its column's address, and nothing else:
// what it would compute instead, it would compute for each chunk.
template <class Traits>
struct TilePlaces {
  // Elements from the head's first row to a key's and to its value's. kNowhere: no row sees the
  // key, and its elements are zero.
  int64_t keys[Traits::kTileK];
  int64_t values[Traits::kTileK];
  int32_t position[Traits::kTileK];  // or -1
  bool masked[2];                    // of each half: whether some row does not see some key

  static constexpr int64_t kNowhere = -1;  // strides are not negative
};

template <class Traits>
struct DecodeStorage {
  using Element = typename Traits::Element;
  alignas(128) Element stages[Traits::kElements];
  TilePlaces<Traits> places[Traits::kPlaces];
  // Registers are scarce at head dim 256, so what the block is at is read from here.
  DecodePlan plan;
  alignas(8) unsigned char cut_place[sizeof(DecodeParts)];
  int32_t part;
  DecodePiece piece;
  int32_t unit, end;  // what is left of the part
  alignas(8) unsigned char piece_keys[sizeof(PieceKeys)];
  int32_t warp_units[Traits::kWarps];
  int32_t first[Traits::kPlannedGroups + 1];
  KeyRange tiles[Traits::kPlannedGroups];

  __device__ __forceinline__ DecodeParts const& cut() const {
    return *reinterpret_cast<DecodeParts const*>(cut_place);
  }
  // Called by one thread: the first piece of the part.
  __device__ __forceinline__ void begin_part(DecodeParams const& params) {
    unit = cut().begin(part);
    end = cut().begin(part + 1);
    find_piece(params, decode_group_of(plan.first, params.groups, unit));
  }
  // The next one, if unit < end then.
  __device__ __forceinline__ void next_piece(DecodeParams const& params) {
    unit = min_int(plan.first[piece.group + 1], end);
    if (unit < end) {
      find_piece(params, piece.group + 1);
    }
  }
  __device__ __forceinline__ void find_piece(DecodeParams const& params, int32_t group) {
    while (plan.first[group + 1] <= unit) {
      ++group;  // without keys
    }
    int32_t const next = plan.first[group + 1];
    piece = piece_of(params, plan, cut(), params.unit_tiles(), part, group, plan.first[group], next,
                     unit, min_int(next, end));
    new (piece_keys) PieceKeys(params, piece);
  }
  __device__ __forceinline__ PieceKeys const& keys() const {
    return *reinterpret_cast<PieceKeys const*>(piece_keys);
  }
  __device__ __forceinline__ Element* stage(int index) {
    return stages + index * Traits::kTileElements;
  }
  __device__ __forceinline__ Element* queries() {
    return stage(Traits::kStages - (Traits::kQueriesInRegisters ? 1 : 0));
  }
  __device__ __forceinline__ TilePlaces<Traits>& places_of(int32_t i) {
    return places[i % Traits::kPlaces];
  }
};

// Finds out where the keys of a piece's tiles lie: two warps, a key for each lane. Rows of a page
// table are asked for a tile before they are needed.
template <class Traits>
class PlaceFinder {
 public:
  __device__ __forceinline__ PlaceFinder(DecodeParams const& params, DecodeStorage<Traits>& smem)
      : params_(params), smem_(smem) {}

  // Finds the first `count` tiles, and asks for the next one.
  __device__ __forceinline__ void begin(int count) {
    CUTE_NO_UNROLL
    for (int i = threadIdx.x / 64; i < count; i += Traits::kThreads / 64) {
      write(i, place(i));
    }
    if (goes_on()) {
      next_ = place(count);
    }
  }
  // Writes down where tile i lies, the next one, and asks for the one after.
  __device__ __forceinline__ void go_on(int32_t i) {
    if (goes_on()) {
      write(i, next_);
      next_ = place(i + 1);
    }
  }

 private:
  static_assert(Traits::kTileK == 64, "two warps");
  // The other warps have the first rows, and perhaps all.
  static __device__ __forceinline__ bool goes_on() { return threadIdx.x >= Traits::kThreads - 64; }
  static __device__ __forceinline__ int key() { return threadIdx.x % 64; }

  // Tiles are counted from the piece's first, and may be beyond its last.
  __device__ __forceinline__ PieceKeys::Place place(int32_t i) const {
    PieceKeys const& keys = smem_.keys();
    int32_t const tile = smem_.piece.tiles.begin + i;
    bool const is_there = tile < smem_.piece.tiles.end;
    int32_t const position = is_there ? keys.position(int64_t{tile} * Traits::kTileK + key()) : -1;
    return keys.place_of(keys.some_row_sees(position) ? position : -1);
  }
  __device__ __forceinline__ void write(int32_t i, PieceKeys::Place const& found) const {
    PieceKeys const& keys = smem_.keys();
    bool const exists = keys.exists(found);
    bool const full = __all_sync(0xffffffff, exists && keys.all_rows_see(found.position));
    auto& to = smem_.places_of(i);
    to.keys[key()] = exists ? offset(params_.k, found) : TilePlaces<Traits>::kNowhere;
    to.values[key()] = exists ? offset(params_.v, found) : TilePlaces<Traits>::kNowhere;
    to.position[key()] = exists ? found.position : -1;
    to.masked[key() / 32] = !full;
  }
  static __device__ __forceinline__ int64_t offset(TensorView const& of,
                                                   PieceKeys::Place const& place) {
    return place.outer * of.batch_stride + place.row * of.axis_stride[kGridAxes - 1];
  }

  DecodeParams const& params_;
  DecodeStorage<Traits>& smem_;
  PieceKeys::Place next_ = {-1, 0, 0};
};

// Copies the rows of a tile of keys or values, which begin at offsets from a head's first, to a
// stage. Called by all threads; returns with the copies in flight, not yet committed.
template <class Traits>
__device__ __forceinline__ void copy_stage(typename Traits::Element* stage, TensorView const& from,
                                           int32_t head, int32_t head_dim,
                                           int64_t const (&offsets)[Traits::kTileK]) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kRowDim / 8;
  constexpr int kRowsAtOnce = Traits::kThreads / kChunks;
  auto const thread = static_cast<uint32_t>(thread_again());
  int const chunk = thread % kChunks;
  int const first = thread / kChunks;
  bool const has_columns = chunk * 8 < head_dim;
  auto const* const base = static_cast<Element const*>(from.data);
  auto const* const column = base + head * from.head_stride + chunk * 8;
#pragma unroll 4
  for (int i = 0; i < Traits::kTileK / kRowsAtOnce; ++i) {
    int const r = first + i * kRowsAtOnce;
    int64_t const offset = offsets[r];
    bool const there = has_columns && offset != TilePlaces<Traits>::kNowhere;
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        stage + chunk_place<Traits::kRowDim>(r, chunk), there ? column + offset : base, there);
  }
}

}  // namespace sparse_fmha::sm80
