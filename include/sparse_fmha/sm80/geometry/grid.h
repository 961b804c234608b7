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
template <class Element>
struct alignas(16) KeyBox {
  Element const* k;  // of its first row
  Element const* v;
  Coord origin;
  bool extra;
  bool clipped;    // the box leaves the grid
  uint8_t needed;  // bit g: by group g of 64 rows
};

template <class Traits, class Mechanism>
struct Grid {
  using Element = typename Traits::Element;
  using Walk = decltype(Mechanism::walk({}, {}, {}));
  static constexpr int kPlaced = 16;  // tiles that are placed at a time

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
    int64_t k_offsets[Traits::kTileK];  // of a box's rows from its first, in bytes
    int64_t v_offsets[Traits::kTileK];
    WindowWords<Traits> words;
    KeyBox<Element> boxes[2 * kPlaced];  // the set of tiles in use and the next
    Walk walk;
    QueryTile q;
    Coord length;                                // positions per axis in the dilation class
    Interval parts[Traits::kGroups][kGridAxes];  // union of what the rows of a group see
  };
  struct Work {
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
    Grid const& grid;
    KeyBox<Element> const& box;
    int64_t const* offsets;
    int64_t extra_stride;
    __device__ __forceinline__ bool whole() const { return !box.extra && !box.clipped; }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      return bytes_from(base, offsets[first + further]);
    }
    __device__ __forceinline__ Element const* operator()(int r) const {
      auto const& g = grid.params.geometry;
      if (box.extra) {
        return r < g.extra_len - box.origin[2] ? base + r * extra_stride : nullptr;
      }
      Coord const c = g.k_bits.offset(r);
      bool inside = true;
      CUTE_UNROLL
      for (int axis = 0; axis < kGridAxes; ++axis) {
        inside &= box.origin[axis] + c[axis] < grid.shared.length[axis];
      }
      return inside ? bytes_from(base, offsets[r]) : nullptr;
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
      shared.k_offsets[r] = offset_of(params.k, offset) * int64_t{sizeof(Element)};
      shared.v_offsets[r] = offset_of(params.v, offset) * int64_t{sizeof(Element)};
    }
    shared.words.table.fill(g.shape.k, g.k_bits);
    __syncthreads();
    find_windows<Mechanism>(shared.words, params.sparsity, g.shape.q, shared.q, shared.length);
    int32_t const head_kv = tile.head / params.heads_per_kv;
    int32_t const ragged = g.extra_len % Traits::kTileK != 0;
    return {tile.batch * volume(params.sparsity.grid) * params.heads_q + tile.head,
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
    __device__ __forceinline__ bool whole() const { return false; }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      return (*this)(first + further);
    }
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
    Coord const& grid = params.sparsity.grid;
    int64_t const index = (int64_t{token[0]} * grid[1] + token[1]) * grid[2] + token[2];
    return work.out + index * params.heads_q;
  }

  // The ragged tile of extra tokens, the boxes of the mechanism's walk, then the other extra
  // tokens.
  __device__ __forceinline__ int tiles(Work const& work) const {
    return work.num_partial + work.num_full;
  }
  // Locating a tile takes many instructions, so the lanes of a warp locate several together.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced == 0 && threadIdx.x < kPlaced) {
      int const tile = i + static_cast<int>(threadIdx.x);
      if (tile < tiles(work)) {
        shared.boxes[tile % (2 * kPlaced)] = box_of(work, tile);
      }
    }
  }
  __device__ __forceinline__ Rows keys(Work const& /*work*/, int i) const {
    return {box_at(i).k, *this, box_at(i), shared.k_offsets,
            params.geometry.extra_k.axis_stride[kGridAxes - 1]};
  }
  __device__ __forceinline__ Rows values(Work const& /*work*/, int i) const {
    return {box_at(i).v, *this, box_at(i), shared.v_offsets,
            params.geometry.extra_v.axis_stride[kGridAxes - 1]};
  }
  __device__ __forceinline__ void write_mask(Work const& work, int i) const {
    if (i >= work.num_partial) {
      return;
    }
    auto const& g = params.geometry;
    KeyBox<Element> const& box = box_at(i);
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
  __device__ __forceinline__ KeyBox<Element> const& box_at(int i) const {
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

  __device__ __forceinline__ KeyBox<Element> box_of(Work const& work, int i) const {
    auto const& g = params.geometry;
    constexpr uint8_t kAll = (1 << Traits::kGroups) - 1;
    int32_t const ragged = g.extra_len % Traits::kTileK != 0;
    int32_t const visited = shared.walk.num_partial + shared.walk.num_full;
    bool const is_ragged = i < ragged;
    if (is_ragged || i - ragged >= visited) {
      int32_t const tile = is_ragged ? g.extra_len / Traits::kTileK : i - ragged - visited;
      int32_t const first = tile * Traits::kTileK;
      return {extra_row(work, g.extra_k, first),
              extra_row(work, g.extra_v, first),
              {0, 0, first},
              true,
              false,
              kAll};
    }
    Coord const origin = shared.walk.tile(i - ragged);
    Coord const token = Mechanism::token(params.sparsity, shared.q.residue, origin);
    int32_t const batch = again(work.batch);
    int32_t const head = again(work.head_kv);
    KeyBox<Element> box{head_of<Element>(params.k, batch, head) + offset_of(params.k, token),
                        head_of<Element>(params.v, batch, head) + offset_of(params.v, token),
                        origin,
                        false,
                        false,
                        kAll};
    for (int axis = 0; axis < kGridAxes; ++axis) {
      int32_t const end = origin[axis] + g.shape.k[axis];
      box.clipped |= end > shared.length[axis];
      for (int group = 0; group < Traits::kGroups; ++group) {
        Interval const& seen = shared.parts[group][axis];
        bool const apart = origin[axis] >= seen.end || end <= seen.begin;
        box.needed &= ~(apart << group);
      }
    }
    return box;
  }
  __device__ __forceinline__ Element const* extra_row(Work const& work, TensorView const& view,
                                                      int32_t token) const {
    return head_of<Element>(view, work.batch, work.head_kv) +
           token * view.axis_stride[kGridAxes - 1];
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
