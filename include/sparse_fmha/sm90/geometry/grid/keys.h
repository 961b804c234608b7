// Geometry of the dK/dV kernel on a grid of up to three axes.
//
// A key tile is a box of keys; a step is a box of queries on the grid of query boxes. Masks are
// those of the forward pass with the roles exchanged: the queries that see a key are also an
// interval on each axis. Names are those of geometry/sequence/keys.h.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/sm90/backward/dkv/order.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/geometry/grid/grid_walk.h"
#include "sparse_fmha/sm90/geometry/grid/window_mask.h"

namespace sparse_fmha::sm90 {

// A mechanism on a grid from the side of its keys: rows are keys, columns are queries. A key out of
// range, which reads as zero, is seen by none: where dQ is added up its weight may overflow.
template <class Mechanism>
struct Inverse {
  static SPARSE_FMHA_HD Interval window(typename Mechanism::Params const& p, int axis, int32_t len,
                                        int32_t k) {
    return k < len ? Mechanism::queries(p, axis, len, k) : Interval{0, 0};
  }
};

template <class Traits, class Mechanism>
struct GridKeys {
  using Element = typename Traits::Element;

  // With three token axes each batch entry needs its own tensor map, and one launch takes at most
  // this many.
  static constexpr int kMaxMaps = 4;
  // Traits of the masks: those of the forward pass with the roles exchanged.
  struct MaskTraits {
    static constexpr int kTileQ = Traits::kTileK;
    static constexpr int kTileK = Traits::kTileQ;
    static constexpr int kStages = Traits::kStages;
  };

  struct Params {
    CUtensorMap k[kMaxMaps];  // (D, H, X, Y, B), or (D, H, X, Y, T) for each batch entry
    CUtensorMap v[kMaxMaps];
    CUtensorMap q[kMaxMaps];
    CUtensorMap dout[kMaxMaps];
    CUtensorMap terms[kMaxMaps];  // (4, H, X, Y, B or T)
    CUtensorMap dk[kMaxMaps];
    CUtensorMap dv[kMaxMaps];
    TileShape shape;  // q: keys, which are the rows; k: queries
    BoxBits q_bits;   // of shape.q
    BoxBits k_bits;   // of shape.k
    bool map_per_batch;
    Coord boxes;        // of queries, of one dilation class; for kernels that add dQ up
    bool seen_by_all;   // the keys are extra tokens, which have their own axis
    int32_t extra_len;  // if seen_by_all
  };

  static constexpr bool kMaskWarp = true;
  static constexpr int kLogQueries = 6;  // of a box, in kernels that add dQ up
  static constexpr bool kByStage = false;
  using Walk = decltype(Mechanism::walk_transposed({}, {}, {}));
  using Order = Ascending;
  using Source = BoxSource;

  struct Work {
    WorkTile tile;
    int32_t num_partial;
    int32_t num_full;
    int32_t place;  // index into Shared
  };
  // In shared memory, because gradients take most of a consumer's registers.
  struct Rows {
    WorkTile tile;
    KeyTile q;     // the key tile, whose keys are the rows of masks
    Coord length;  // positions per axis in the dilation class
  };
  struct Shared {
    Walk walks[2];  // of this key tile and the next
    Rows rows[2];
    WindowWords<MaskTraits> words;
  };
  struct Step {
    KeyBox box;    // of queries
    int32_t head;  // in the group
    bool masked;
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context);  // in launch_keys.h

  DkvParams<GridKeys, Mechanism> const& params;
  Shared& shared;

  using Masks = WindowMasks<MaskTraits, Inverse<Mechanism>, DkvParams<GridKeys, Mechanism>>;
  __device__ __forceinline__ Masks masks() const { return {params, shared.words}; }
  __device__ __forceinline__ Rows const& rows(Work const& work) const {
    return shared.rows[work.place];
  }
  __device__ __forceinline__ void init() const { masks().init(); }

  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& state) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    // The scheduler starts with the last tile. On a causal axis the first keys are seen by most
    // queries.
    work.tile.q_tile = params.scheduler.q_tiles - 1 - tile.q_tile;
    Walk& walk = shared.walks[state.phase];
    Rows& rows = shared.rows[state.phase];
    rows.tile = work.tile;
    work.place = static_cast<int32_t>(state.phase);
    TileShape const shape = {params.geometry.shape.k, params.geometry.shape.q};
    if (params.geometry.seen_by_all) {
      rows.q = {{0, 0, 0}, {0, 0, work.tile.q_tile * Traits::kTileK}};
      walk = everything(shape.q, rows.q.origin[2] + Traits::kTileK > params.geometry.extra_len);
    } else {
      rows.q = Mechanism::key_tile(params.sparsity, shape, work.tile.q_tile);
      compiler_fence();  // reload from shared memory later: registers are scarce
      walk = Mechanism::walk_transposed(params.sparsity, shape, rows.q);
    }
    compiler_fence();
    for (int axis = 0; axis < kGridAxes; ++axis) {
      rows.length[axis] = Mechanism::length(params.sparsity, axis, rows.q.residue[axis]);
    }
    work.num_partial = walk.num_partial;
    work.num_full = walk.num_full;
  }

  struct Counts {
    int32_t num_partial;
    int32_t num_full;
  };
  __device__ __forceinline__ Counts walk(Work const& work) const {
    return {work.num_partial, work.num_full};
  }
  // Locating a box takes many instructions, so the lanes of the warp locate the next 32 together.
  struct Steps {
    Walk const& walk;
    int tiles;  // per head
    int count;
    Coord mine;
    int head = 0;
    int tile = 0;
    __device__ __forceinline__ Step next(int i) {
      if (i % 32 == 0) {
        mine = walk.tile((tile + static_cast<int>(threadIdx.x % 32)) % tiles);
      }
      auto from = [&](int32_t x) { return __shfl_sync(0xffffffff, x, i % 32); };
      Step const step = {
          {{from(mine[0]), from(mine[1]), from(mine[2])}, 0, 0}, head, tile < walk.num_partial};
      if (++tile == tiles) {
        tile = 0;
        ++head;
      }
      return step;
    }
  };
  __device__ __forceinline__ Steps steps(Work const& work) const {
    int const tiles = work.num_partial + work.num_full;
    return {shared.walks[work.place], tiles, tiles * params.heads_per_kv, {}};
  }
  __device__ __forceinline__ Source source(Work const& work, Step const& step) const {
    return place(work, step.box.origin, work.tile.head * params.heads_per_kv + step.head);
  }
  // Tiles are in row-major order, on each axis first by dilation class (device::SumTiles).
  __device__ __forceinline__ int32_t query_tile(Work const& work, Step const& step) const {
    auto const& g = params.geometry;
    Coord const& residue = rows(work).q.residue;
    Coord const& origin = step.box.origin;
    int const log_x = g.k_bits.x;
    int const log_y = g.k_bits.y;
    Coord const box = {origin[0] >> (kLogQueries - log_y - log_x), origin[1] >> log_y,
                       origin[2] >> log_x};
    int32_t index = 0;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      index = index * params.sparsity.dilation[axis] * g.boxes[axis] +
              residue[axis] * g.boxes[axis] + box[axis];
    }
    int32_t const head = work.tile.head * params.heads_per_kv + step.head;
    return params.dq.first_tile(work.tile.batch, head) + index;
  }

  __device__ __forceinline__ void load_keys(FullBarrier& barrier, Element* k, Element* v,
                                            Work const& work) const {
    auto const& g = params.geometry;
    Source const from = place(work, shared.rows[work.place].q.origin, work.tile.head);
    load(g.k[from.map], barrier, k, Traits::kTileK, from, kReadOnce);
    load(g.v[from.map], barrier, v, Traits::kTileK, from, kReadOnce);
  }
  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* to,
                                         Source const& from) const {
    load(params.geometry.q[from.map], barrier, to, Traits::kTileQ, from, kReadByMany);
  }
  __device__ __forceinline__ void load_dout(FullBarrier& barrier, Element* to,
                                            Source const& from) const {
    load(params.geometry.dout[from.map], barrier, to, Traits::kTileQ, from, kReadByMany);
  }
  __device__ __forceinline__ void load_terms(FullBarrier& barrier, RowTerms* to,
                                             Source const& from) const {
    cute::SM90_TMA_LOAD_5D::copy(&params.geometry.terms[from.map],
                                 reinterpret_cast<uint64_t*>(&barrier),
                                 static_cast<uint64_t>(kReadByMany), to, 0, from.head,
                                 from.place[0], from.place[1], from.place[2]);
  }

  // Extra tokens have no bias.
  __device__ __forceinline__ int64_t key_index(Work const& work, int row) const {
    Rows const& rows = this->rows(work);
    Coord position = params.geometry.q_bits.offset(row);
    bool inside = true;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      position[axis] += rows.q.origin[axis];
      inside &= position[axis] < rows.length[axis];
    }
    Coord const token = Mechanism::token(params.sparsity, rows.q.residue, position);
    int64_t index = 0;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      index += token[axis] * params.bias.from.axis_stride[axis];
    }
    return inside ? index : -1;
  }

  __device__ __forceinline__ void begin_masks(Work const& work) const {
    if (Traits::kAddsDq && params.geometry.seen_by_all) {
      find_all(rows(work).q.origin[2]);
    } else {
      masks().find_windows(rows(work));
    }
  }
  __device__ __forceinline__ void publish_mask(Work const& /*work*/, Step const& step,
                                               RingState<Traits::kStages> const& place) const {
    if (step.masked) {
      masks().publish(step.box, place);
    }
  }
  __device__ __forceinline__ int mask_place(Counts const& /*walk*/, int /*i*/,
                                            RingState<Traits::kStages> const& place) const {
    return WindowWords<MaskTraits>::mask_of(place);
  }
  class Mask : public WindowRows<MaskTraits> {
   public:
    __device__ __forceinline__ Mask(GridKeys const& geometry, Work const& /*work*/, int part)
        : WindowRows<MaskTraits>(geometry.shared.words, geometry.params.geometry.shape.q,
                                 geometry.params.geometry.q_bits, part) {}
  };

  __device__ __forceinline__ void store_dk(Element const* from, Work const& work, int part) const {
    store(params.geometry.dk, from, work, part);
  }
  __device__ __forceinline__ void store_dv(Element const* from, Work const& work, int part) const {
    store(params.geometry.dv, from, work, part);
  }

 private:
  // The windows of extra tokens that start at `first`: all queries, none of tokens out of range.
  __device__ __forceinline__ void find_all(int32_t first) const {
    __syncwarp();  // the last key tile's windows have been read
    CUTE_NO_UNROLL
    for (int i = threadIdx.x % 32; i < Traits::kTileK + 2; i += 32) {
      bool const there =
          i < 2 || first + i - 2 < params.geometry.extra_len;  // sides are 1, 1, keys
      shared.words.windows[i] = {0, there ? INT32_MAX : 0};
    }
    __syncwarp();
  }
  // The walk over all boxes of queries, when every query sees the keys. `ragged`: some of the keys
  // are out of range. That matters to dQ only: their weights may overflow.
  __device__ __forceinline__ Walk everything(Coord const& step, bool ragged) const {
    Walk walk{};
    walk.step = step;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      walk.count[axis] = ceil_div(params.sparsity.grid[axis], step[axis]);
    }
    int32_t const boxes = static_cast<int32_t>(volume(walk.count));
    if (Traits::kAddsDq && ragged) {
      walk.num_partial = boxes;
    } else {
      walk.full = walk.count;
      walk.num_full = boxes;
    }
    return walk;
  }
  __device__ __forceinline__ Source place(Work const& work, Coord const& position,
                                          int32_t head) const {
    Coord const token = Mechanism::token(params.sparsity, rows(work).q.residue, position);
    bool const per_batch = params.geometry.map_per_batch;
    int32_t const batch = rows(work).tile.batch;
    return {per_batch ? batch : 0, head, {token[2], token[1], per_batch ? token[0] : batch}};
  }
  static __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                              Element* to, int rows, Source const& from,
                                              cute::TMA::CacheHintSm90 hint) {
    load_box<Traits::kHeadDim>(map, barrier, to, rows, hint, from.head, from.place[0],
                               from.place[1], from.place[2]);
  }
  __device__ __forceinline__ void store(CUtensorMap const (&maps)[kMaxMaps], Element const* from,
                                        Work const& work, int part) const {
    Coord const offset = params.geometry.q_bits.offset(part * 64);
    Coord const& origin = rows(work).q.origin;
    Source const to =
        place(work, {origin[0] + offset[0], origin[1] + offset[1], origin[2] + offset[2]},
              rows(work).tile.head);
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_5D::copy(&maps[to.map], from + d * Traits::kStoredRows, d, to.head,
                                    to.place[0], to.place[1], to.place[2]);
    }
  }
};

}  // namespace sparse_fmha::sm90
