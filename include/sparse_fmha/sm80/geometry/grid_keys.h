// Geometry of the dK/dV kernel on a grid of up to three axes.
//
// A key tile is a box of keys, or a range of extra tokens; a step is a box of queries on the grid
// of query boxes. Masks are those of the forward pass with the roles exchanged: the queries that
// see a key are also an interval on each axis. Names are those of geometry/sequence_keys.h.
#pragma once

#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/planning/tiling.h"
#include "sparse_fmha/sm80/backward/dkv/run_kernel.h"
#include "sparse_fmha/sm80/backward/traits.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/window_mask.h"

namespace sparse_fmha::sm80 {

// A mechanism on a grid from the side of its keys: rows are keys, columns are queries.
template <class Mechanism>
struct Inverse {
  using Params = typename Mechanism::Params;
  static SPARSE_FMHA_HD Interval window(Params const& p, int axis, int32_t len, int32_t k) {
    return Mechanism::queries(p, axis, len, k);
  }
};

template <class Traits, class Mechanism>
struct GridKeys {
  using Element = typename Traits::Element;
  using Walk = decltype(Mechanism::walk_transposed({}, {}, {}));
  static constexpr int kPlaced = 32;  // steps that are placed at a time
  struct MaskTraits {
    static constexpr int kTileQ = Traits::kTileK;
    static constexpr int kTileK = Traits::kTileQ;
  };

  struct Params {
    TileShape shape;    // q: keys, which are the rows; k: queries
    BoxBits q_bits;     // of shape.q
    BoxBits k_bits;     // of shape.k
    int32_t extra_len;  // if not 0, the keys are extra tokens, which every query sees
  };
  struct Shared {
    int64_t q_offsets[Traits::kTileQ];  // of a box's rows from its first, in elements
    int64_t dout_offsets[Traits::kTileQ];
    int32_t token_offsets[Traits::kTileQ];
    WindowWords<MaskTraits> words;
    Coord boxes[2 * kPlaced];  // of queries: the set of steps in use and the next
    Walk walk;
    KeyTile tile;
    Coord length;  // positions per axis in the dilation class
  };
  struct Work {
    int32_t batch;
    int32_t head_kv;
    int32_t num_partial;  // of each head
    int32_t tiles;
  };

  DkvParams<GridKeys, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& g = params.geometry;
    if (threadIdx.x == 0) {
      // The scheduler starts with the last tile. On a causal axis the first keys are seen by most
      // queries.
      find_walk(params.scheduler.q_tiles - 1 - tile.q_tile);
    }
    for (int r = threadIdx.x; r < Traits::kTileQ; r += Traits::kThreads) {
      Coord const offset = Mechanism::token(params.sparsity, {0, 0, 0}, g.k_bits.offset(r));
      shared.q_offsets[r] = offset_of(params.q, offset);
      shared.dout_offsets[r] = offset_of(params.dout, offset);
      shared.token_offsets[r] = index_of(offset);
    }
    shared.words.table.fill(g.shape.k, g.k_bits);
    __syncthreads();
    QueryTile const rows{shared.tile.residue, shared.tile.origin};
    find_windows<Inverse<Mechanism>>(shared.words, params.sparsity, g.shape.q, rows, shared.length);
    Walk const& walk = shared.walk;
    return {tile.batch, tile.head, walk.num_partial, walk.num_partial + walk.num_full};
  }

  struct KeyRows {
    GridKeys const& grid;
    Element const* base;
    TensorView const& view;
    __device__ __forceinline__ bool whole() const { return false; }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      return (*this)(first + further);
    }
    __device__ __forceinline__ Element const* operator()(int r) const {
      Coord token;
      return grid.find_key(r, token) ? base + offset_of(view, token) : nullptr;
    }
  };
  __device__ __forceinline__ KeyRows keys(Work const& work, TensorView const& view) const {
    return {*this, sm80::head_of<Element>(view, work.batch, work.head_kv), view};
  }
  __device__ __forceinline__ int64_t key_row(Work const& work, int r) const {
    Coord token;
    if (!find_key(r, token)) {
      return -1;
    }
    int32_t const extra = params.geometry.extra_len;
    int64_t const index = extra > 0 ? token[2] : index_of(token);
    int64_t const keys = extra > 0 ? extra : volume(params.sparsity.grid);
    return (work.batch * keys + index) * params.heads_kv + work.head_kv;
  }

  __device__ __forceinline__ int steps(Work const& work) const {
    return work.tiles * params.heads_per_kv;
  }
  // Locating a box takes many instructions, so the lanes of a warp locate 32 together.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced == 0 && threadIdx.x < kPlaced) {
      int const step = i + static_cast<int>(threadIdx.x);
      if (step < steps(work)) {
        shared.boxes[step % (2 * kPlaced)] = shared.walk.tile(step % work.tiles);
      }
    }
  }
  // Rows of a step.
  struct Rows {
    Element const* base;
    int64_t const* offsets;
    BoxBits bits;
    Coord room;    // positions from the box's first to the end of the grid
    bool clipped;  // the box leaves the grid
    __device__ __forceinline__ bool whole() const { return !clipped; }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      return base + offsets[first + further];
    }
    __device__ __forceinline__ Element const* operator()(int r) const {
      return !clipped || is_inside(bits, room, r) ? base + offsets[r] : nullptr;
    }
  };
  __device__ __forceinline__ Rows queries(Work const& work, int i) const {
    return rows(work, i, params.q, shared.q_offsets);
  }
  __device__ __forceinline__ Rows douts(Work const& work, int i) const {
    return rows(work, i, params.dout, shared.dout_offsets);
  }
  __device__ __forceinline__ int64_t query_row(Work const& work, int i, int r) const {
    Coord const& origin = box_at(i);
    if (!is_inside(params.geometry.k_bits, room_of(origin), r)) {
      return -1;
    }
    int64_t const token = index_of(Mechanism::token(params.sparsity, shared.tile.residue, origin)) +
                          shared.token_offsets[r];
    return (work.batch * volume(params.sparsity.grid) + token) * params.heads_q + head_of(work, i);
  }
  __device__ __forceinline__ void write_mask(Work const& work, int i) const {
    if (is_masked(work, i, 0)) {
      show_windows<MaskTraits>(shared.words, params.geometry.shape, box_at(i), i);
    }
  }
  __device__ __forceinline__ bool needs(Work const& /*work*/, int /*i*/, int /*row*/) const {
    return true;
  }
  __device__ __forceinline__ bool is_masked(Work const& work, int i, int /*row*/) const {
    return i % work.tiles < work.num_partial;
  }
  class Mask : public WindowRows<MaskTraits> {
   public:
    __device__ __forceinline__ Mask(GridKeys const& grid, Work const& /*work*/, int row)
        : WindowRows<MaskTraits>(grid.shared.words, grid.params.geometry.shape.q,
                                 grid.params.geometry.q_bits, row) {}
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    DkvParams<GridKeys, Mechanism> params;
    auto const& sparsity = params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    auto& g = params.geometry;
    Gradients const& gradients = *p.gradients;
    int64_t const queries = volume(sparsity.grid);
    set_shape(g, sparsity);
    TileShape const shape = {g.shape.k, g.shape.q};
    g.extra_len = 0;
    run_dkv_kernel<Traits>(params, p, {p.k, p.v, gradients.k, gradients.v},
                           Mechanism::num_key_tiles(sparsity, shape), queries, context);
    if (p.extra_len > 0) {
      params.sparsity.dilation = {1, 1, 1};
      set_shape(g, params.sparsity);
      g.shape.q = {1, 1, Traits::kTileK};
      g.q_bits = {0, log2_floor(Traits::kTileK)};
      g.extra_len = p.extra_len;
      run_dkv_kernel<Traits>(params, p,
                             {p.extra_k, p.extra_v, gradients.extra_k, gradients.extra_v},
                             ceil_div(p.extra_len, Traits::kTileK), queries, context);
    }
  }

 private:
  // Boxes of any shape can be copied. The fewest tiles, then the fewest with masks.
  static void set_shape(Params& g, typename Mechanism::Params const& sparsity) {
    constexpr int32_t kAnySide = Traits::kTileQ > Traits::kTileK ? Traits::kTileQ : Traits::kTileK;
    TileShape const shape =
        choose_tiles(sparsity, Traits::kTileQ, Traits::kTileK, {kAnySide, kAnySide, kAnySide},
                     TileCosts{1, 1, 0}, KeyTiling::kStatic);
    g.shape = {shape.k, shape.q};
    g.q_bits = {log2_floor(g.shape.q[1]), log2_floor(g.shape.q[2])};
    g.k_bits = {log2_floor(g.shape.k[1]), log2_floor(g.shape.k[2])};
  }
  static __device__ __forceinline__ int64_t offset_of(TensorView const& view, Coord const& token) {
    return token[0] * view.axis_stride[0] + token[1] * view.axis_stride[1] +
           token[2] * view.axis_stride[2];
  }
  static __device__ __forceinline__ bool is_inside(BoxBits const& bits, Coord const& room, int r) {
    Coord const c = bits.offset(r);
    return c[0] < room[0] && c[1] < room[1] && c[2] < room[2];
  }
  __device__ __forceinline__ int32_t index_of(Coord const& token) const {
    Coord const& grid = params.sparsity.grid;
    return (token[0] * grid[1] + token[1]) * grid[2] + token[2];
  }
  __device__ __forceinline__ Coord const& box_at(int i) const {
    return shared.boxes[i % (2 * kPlaced)];
  }
  __device__ __forceinline__ Coord room_of(Coord const& origin) const {
    Coord const& length = shared.length;
    return {length[0] - origin[0], length[1] - origin[1], length[2] - origin[2]};
  }
  __device__ __forceinline__ int32_t head_of(Work const& work, int i) const {
    return work.head_kv * params.heads_per_kv + i / work.tiles;
  }

  // By one thread.
  __device__ __forceinline__ void find_walk(int32_t index) const {
    auto const& g = params.geometry;
    TileShape const shape = {g.shape.k, g.shape.q};
    if (g.extra_len > 0) {
      shared.tile = {{0, 0, 0}, {0, 0, index * Traits::kTileK}};
      shared.walk = everything();
    } else {
      shared.tile = Mechanism::key_tile(params.sparsity, shape, index);
      shared.walk = Mechanism::walk_transposed(params.sparsity, shape, shared.tile);
    }
    for (int axis = 0; axis < kGridAxes; ++axis) {
      shared.length[axis] = Mechanism::length(params.sparsity, axis, shared.tile.residue[axis]);
    }
  }
  // The walk over all boxes of queries, when every query sees the keys.
  __device__ __forceinline__ Walk everything() const {
    Walk walk{};
    walk.step = params.geometry.shape.k;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      walk.count[axis] = ceil_div(params.sparsity.grid[axis], walk.step[axis]);
    }
    walk.full = walk.count;
    walk.num_full = static_cast<int32_t>(volume(walk.count));
    return walk;
  }
  // Whether there is an r-th key, and its token: extra tokens count on the last axis.
  __device__ __forceinline__ bool find_key(int r, Coord& token) const {
    Coord position = params.geometry.q_bits.offset(r);
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      position[axis] += shared.tile.origin[axis];
    }
    if (params.geometry.extra_len > 0) {
      token = position;
      return position[2] < params.geometry.extra_len;
    }
    token = Mechanism::token(params.sparsity, shared.tile.residue, position);
    Coord const& length = shared.length;
    return position[0] < length[0] && position[1] < length[1] && position[2] < length[2];
  }
  __device__ __forceinline__ Rows rows(Work const& work, int i, TensorView const& view,
                                       int64_t const* offsets) const {
    Coord const origin = box_at(i);
    Coord const room = room_of(origin);
    Coord const& side = params.geometry.shape.k;
    Coord const token = Mechanism::token(params.sparsity, shared.tile.residue, origin);
    return {sm80::head_of<Element>(view, work.batch, head_of(work, i)) + offset_of(view, token),
            offsets, params.geometry.k_bits, room,
            room[0] < side[0] || room[1] < side[1] || room[2] < side[2]};
  }
};

}  // namespace sparse_fmha::sm80
