// Tokens on a grid of up to three axes. A tile is a box whose shape is a run-time value.
//
// The rows of a box are found by a table of their offsets, so keys stay where they are, and boxes
// may start at any token and have any dilation. Names are those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/planning/choose_order.h"
#include "sparse_fmha/planning/tiling.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/run_kernel.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/window_mask.h"

namespace sparse_fmha::sm80 {

// A key tile: a box at a position of the grid, or a range of extra tokens that starts at origin[2].
struct KeyBox {
  Coord origin;
  bool extra;
  uint8_t needed;  // bit g: by group g of 64 rows
};

template <class Traits, class Mechanism>
struct Grid {
  using Element = typename Traits::Element;
  using Walk = decltype(Mechanism::walk({}, {}, {}));
  static constexpr int kPlaced = 32;  // tiles that are placed at a time

  struct Params {
    TensorView extra_k;
    TensorView extra_v;
    TileShape shape;
    TileOrder order;  // of query tiles
    BoxBits q_bits;   // of shape.q
    BoxBits k_bits;   // of shape.k
    int32_t extra_len;
  };
  struct Shared {
    int64_t k_offsets[Traits::kTileK];  // of a box's rows from its first, in elements
    int64_t v_offsets[Traits::kTileK];
    WindowWords<Traits> words;
    KeyBox boxes[2 * kPlaced];  // the set of tiles in use and the next
    Walk walk;
    QueryTile q;
    Coord length;                                // positions per axis in the dilation class
    Interval parts[Traits::kGroups][kGridAxes];  // union of what the rows of a group see
  };
  struct Work {
    Element const* k;  // of the head
    Element const* v;
    int64_t out;  // index of the head's first row in [B, Lq, Hq]
    int32_t batch;
    int32_t head;
    int32_t head_kv;
    int32_t num_partial;
    int32_t num_full;
  };

  // Rows of a tile.
  struct Rows {
    Element const* base;
    int64_t const* offsets;
    int64_t extra_stride;
    int32_t extra_len;  // rows of extra tokens
    BoxBits bits;
    Coord room;  // positions from the box's first to the end of the grid
    bool extra;
    bool clipped;  // the box leaves the grid
    __device__ __forceinline__ Element const* operator()(int r) const {
      if (extra) {
        return r < extra_len ? base + r * extra_stride : nullptr;
      }
      bool inside = true;
      if (clipped) {
        Coord const c = bits.offset(r);
        inside = c[0] < room[0] && c[1] < room[1] && c[2] < room[2];
      }
      return inside ? base + offsets[r] : nullptr;
    }
  };

  KernelParams<Grid, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& g = params.geometry;
    if (threadIdx.x == 0) {
      find_walk(g.order.at(tile.q_tile, params.scheduler.q_tiles));
    }
    for (int r = threadIdx.x; r < Traits::kTileK; r += Traits::kThreads) {
      Coord const offset = Mechanism::token(params.sparsity, {0, 0, 0}, g.k_bits.offset(r));
      shared.k_offsets[r] = offset_of(params.k, offset);
      shared.v_offsets[r] = offset_of(params.v, offset);
    }
    shared.words.table.fill(g.shape.k, g.k_bits);
    __syncthreads();
    find_windows<Mechanism>(shared.words, params.sparsity, g.shape.q, shared.q, shared.length);
    int32_t const head_kv = tile.head / params.heads_per_kv;
    int32_t const ragged = g.extra_len % Traits::kTileK != 0;
    return {head_of<Element>(params.k, tile.batch, head_kv),
            head_of<Element>(params.v, tile.batch, head_kv),
            tile.batch * volume(params.sparsity.grid) * params.heads_q + tile.head,
            tile.batch,
            tile.head,
            head_kv,
            shared.walk.num_partial + ragged,
            shared.walk.num_full + g.extra_len / Traits::kTileK};
  }

  struct QueryRows {
    Grid const& grid;
    Element const* base;
    TensorView const& view;
    __device__ __forceinline__ Element const* operator()(int r) const {
      Coord token;
      return grid.find_query(r, token) ? base + offset_of(view, token) : nullptr;
    }
  };
  __device__ __forceinline__ QueryRows queries(Work const& work, TensorView const& view) const {
    return {*this, head_of<Element>(view, work.batch, work.head), view};
  }
  __device__ __forceinline__ int64_t out_row(Work const& work, int r) const {
    Coord token;
    if (!find_query(r, token)) {
      return -1;
    }
    return work.out + index_of(token) * params.heads_q;
  }

  // The ragged tile of extra tokens, the boxes of the mechanism's walk, then the other extra
  // tokens.
  __device__ __forceinline__ int tiles(Work const& work) const {
    return work.num_partial + work.num_full;
  }
  // Locating a tile takes many instructions, so the lanes of a warp locate 32 together.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced == 0 && threadIdx.x < kPlaced) {
      int const tile = i + static_cast<int>(threadIdx.x);
      if (tile < tiles(work)) {
        shared.boxes[tile % (2 * kPlaced)] = box_of(tile);
      }
    }
  }
  __device__ __forceinline__ Rows keys(Work const& work, int i) const {
    return rows(work, work.k, params.k, params.geometry.extra_k, shared.k_offsets, i);
  }
  __device__ __forceinline__ Rows values(Work const& work, int i) const {
    return rows(work, work.v, params.v, params.geometry.extra_v, shared.v_offsets, i);
  }
  __device__ __forceinline__ int64_t key_index(Work const& /*work*/, int i, int r) const {
    KeyBox const& box = box_at(i);
    Coord position = params.geometry.k_bits.offset(r);
    bool has_number = !box.extra;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      position[axis] += box.origin[axis];
      has_number &= position[axis] < shared.length[axis];
    }
    return has_number ? index_of(Mechanism::token(params.sparsity, shared.q.residue, position))
                      : -1;
  }
  __device__ __forceinline__ void write_mask(Work const& work, int i) const {
    if (i >= work.num_partial) {
      return;
    }
    auto const& g = params.geometry;
    KeyBox const& box = box_at(i);
    if (box.extra) {
      show_first<Traits>(shared.words, g.shape.q, g.extra_len - box.origin[2], i);
    } else {
      show_windows<Traits>(shared.words, g.shape, box.origin, i);
    }
  }
  __device__ __forceinline__ bool needs(Work const& /*work*/, int i, int group) const {
    return box_at(i).needed >> group & 1;
  }
  __device__ __forceinline__ bool is_masked(Work const& work, int i) const {
    return i < work.num_partial;
  }

  class Mask : public WindowRows<Traits> {
   public:
    __device__ __forceinline__ Mask(Grid const& grid, Work const& /*work*/, int row)
        : WindowRows<Traits>(grid.shared.words, grid.params.geometry.shape.q,
                             grid.params.geometry.q_bits, row) {}
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    KernelParams<Grid, Mechanism> params;
    auto const& sparsity = params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    auto& g = params.geometry;
    // Boxes of any shape can be copied. The fewest tiles, then the fewest with masks.
    constexpr int32_t kAnySide = Traits::kTileQ > Traits::kTileK ? Traits::kTileQ : Traits::kTileK;
    g.shape = choose_tiles(sparsity, Traits::kTileQ, Traits::kTileK, {kAnySide, kAnySide, kAnySide},
                           TileCosts{1, 1, 0});
    g.q_bits = {log2_floor(g.shape.q[1]), log2_floor(g.shape.q[2])};
    g.k_bits = {log2_floor(g.shape.k[1]), log2_floor(g.shape.k[2])};
    g.extra_k = p.extra_k;
    g.extra_v = p.extra_v;
    g.extra_len = p.extra_len;
    int64_t const keys = volume(sparsity.grid);
    int32_t const side_by_side = heads_side_by_side(p, static_cast<double>(keys));
    g.order = choose_order(sparsity, g.shape, ceil_div(multiprocessor_count(), side_by_side));
    run_kernel<Traits>(params, p, Mechanism::num_query_tiles(sparsity, g.shape), keys, context);
  }

 private:
  static __device__ __forceinline__ int64_t offset_of(TensorView const& view, Coord const& token) {
    return token[0] * view.axis_stride[0] + token[1] * view.axis_stride[1] +
           token[2] * view.axis_stride[2];
  }
  __device__ __forceinline__ int64_t index_of(Coord const& token) const {
    Coord const& grid = params.sparsity.grid;
    return (int64_t{token[0]} * grid[1] + token[1]) * grid[2] + token[2];
  }
  __device__ __forceinline__ KeyBox const& box_at(int i) const {
    return shared.boxes[i % (2 * kPlaced)];
  }

  // By one thread.
  __device__ __forceinline__ void find_walk(int32_t q_tile) const {
    auto const& g = params.geometry;
    QueryTile const q = Mechanism::query_tile(params.sparsity, g.shape, q_tile);
    Coord length;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      length[axis] = Mechanism::length(params.sparsity, axis, q.residue[axis]);
    }
    shared.q = q;
    shared.length = length;
    shared.walk = Mechanism::walk(params.sparsity, g.shape, q);
    for (int group = 0; group < Traits::kGroups; ++group) {
      Coord const first = g.q_bits.offset(group * 64);
      Coord const last = g.q_bits.offset(group * 64 + 63);
      for (int axis = 0; axis < kGridAxes; ++axis) {
        auto window = [&](int32_t offset) {
          return Mechanism::window(params.sparsity, axis, length[axis], q.origin[axis] + offset);
        };
        shared.parts[group][axis] = {window(first[axis]).begin, window(last[axis]).end};
      }
    }
  }

  __device__ __forceinline__ KeyBox box_of(int i) const {
    constexpr uint8_t kAll = (1 << Traits::kGroups) - 1;
    int32_t const extra_len = params.geometry.extra_len;
    int32_t const ragged = extra_len % Traits::kTileK != 0;
    int32_t const visited = shared.walk.num_partial + shared.walk.num_full;
    if (i < ragged) {
      return {{0, 0, extra_len / Traits::kTileK * Traits::kTileK}, true, kAll};
    }
    if (i - ragged >= visited) {
      return {{0, 0, (i - ragged - visited) * Traits::kTileK}, true, kAll};
    }
    KeyBox box{shared.walk.tile(i - ragged), false, kAll};
    for (int group = 0; group < Traits::kGroups; ++group) {
      for (int axis = 0; axis < kGridAxes; ++axis) {
        Interval const& seen = shared.parts[group][axis];
        bool const apart = box.origin[axis] >= seen.end ||
                           box.origin[axis] + params.geometry.shape.k[axis] <= seen.begin;
        box.needed &= ~(apart << group);
      }
    }
    return box;
  }

  __device__ __forceinline__ Rows rows(Work const& work, Element const* base,
                                       TensorView const& view, TensorView const& extra,
                                       int64_t const* offsets, int i) const {
    auto const& g = params.geometry;
    KeyBox const& box = box_at(i);
    Rows rows{base, offsets, 0, 0, g.k_bits, {0, 0, 0}, box.extra, false};
    if (box.extra) {
      rows.extra_stride = extra.axis_stride[kGridAxes - 1];
      rows.extra_len = g.extra_len - box.origin[2];
      rows.base =
          head_of<Element>(extra, work.batch, work.head_kv) + box.origin[2] * rows.extra_stride;
      return rows;
    }
    rows.base += offset_of(view, Mechanism::token(params.sparsity, shared.q.residue, box.origin));
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      rows.room[axis] = shared.length[axis] - box.origin[axis];
      rows.clipped |= rows.room[axis] < g.shape.k[axis];
    }
    return rows;
  }

  // Whether the tensor has the r-th row of the query tile, and its token.
  __device__ __forceinline__ bool find_query(int r, Coord& token) const {
    Coord position = params.geometry.q_bits.offset(r);
    bool inside = true;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      position[axis] += shared.q.origin[axis];
      inside &= position[axis] < shared.length[axis];
    }
    token = Mechanism::token(params.sparsity, shared.q.residue, position);
    return inside;
  }
};

}  // namespace sparse_fmha::sm80
