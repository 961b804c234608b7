// Launches of dK/dV kernels on a grid of tokens. As in the forward pass, one launch per interleaved
// grid, plus one for extra tokens.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/planning/tiling.h"
#include "sparse_fmha/sm90/backward/dkv/run_kernel.h"
#include "sparse_fmha/sm90/geometry/grid/boxes.h"
#include "sparse_fmha/sm90/geometry/grid/keys.h"

namespace sparse_fmha::sm90 {

// The tokens {first + i * step} of a grid.
struct InterleavedGrid {
  Coord grid;  // all tokens
  Coord first;
  Coord step;
  Coord element_strides;  // inside boxes
  bool map_per_batch;

  Coord tokens() const {
    Coord n;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      n[axis] = ceil_div(grid[axis] - first[axis], step[axis]);
    }
    return n;
  }
  // The axes of a tensor map after the head dimension, for batch entry `batch`.
  std::array<MapAxis, 4> axes(TensorView const& view, int32_t heads, int32_t batch,
                              Coord const& box) const {
    Coord const extent = tokens();
    auto axis = [&](int a) {
      return MapAxis{extent[a], view.axis_stride[a] * step[a], static_cast<uint32_t>(box[a]),
                     static_cast<uint32_t>(element_strides[a])};
    };
    MapAxis const last = map_per_batch ? axis(0) : MapAxis{batch, view.batch_stride};
    return {MapAxis{heads, view.head_stride}, axis(2), axis(1), last};
  }
  void* data(TensorView const& view, int32_t batch, int bytes) const {
    return static_cast<char*>(interleaved(view, first, step, bytes).data) +
           bytes * batch * view.batch_stride;
  }
};

// Keys, values and their gradients.
struct KeyTensors {
  TensorView k;
  TensorView v;
  TensorView dk;
  TensorView dv;
};

// Makes the tensor maps of queries and of keys, which may be extra tokens.
template <class Traits, class Geometry, class Mechanism>
void launch_key_tiles(FmhaProblem const& p, InterleavedGrid const& queries,
                      InterleavedGrid const& keys, KeyTensors const& kv,
                      DkvParams<Geometry, Mechanism>& params, int32_t key_tiles,
                      ExecutionContext const& context) {
  Gradients const& gradients = *p.gradients;
  TensorView terms{gradients.row_terms};
  terms.head_stride = 4;
  int64_t stride = int64_t{4} * p.heads_q;
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    terms.axis_stride[axis] = stride;
    stride *= p.grid_q[axis];
  }
  terms.batch_stride = stride;

  auto& g = params.geometry;
  g.q_bits = box_bits(g.shape.q);
  g.k_bits = box_bits(g.shape.k);
  g.map_per_batch = queries.map_per_batch;
  g.extra_len = g.seen_by_all ? p.extra_len : 0;
  auto map = [&](InterleavedGrid const& grid, TensorView const& view, int32_t heads, int32_t dim,
                 int32_t batch, Coord const& box) {
    return make_tensor_map<4>(grid.data(view, batch, 2), p.dtype, dim,
                              grid.axes(view, heads, p.batch, box));
  };
  Coord const part = warpgroup_box(g.shape.q);
  int32_t const batch_step = g.map_per_batch ? Geometry::kMaxMaps : p.batch;
  for (int32_t first = 0; first < p.batch; first += batch_step) {
    int32_t const batch = std::min(batch_step, p.batch - first);
    for (int32_t i = 0; i < (g.map_per_batch ? batch : 1); ++i) {
      int32_t const entry = first + i;
      g.k[i] = map(keys, kv.k, p.heads_kv, p.head_dim, entry, g.shape.q);
      g.v[i] = map(keys, kv.v, p.heads_kv, p.value_dim, entry, g.shape.q);
      g.dk[i] = map(keys, kv.dk, p.heads_kv, p.head_dim, entry, part);
      g.dv[i] = map(keys, kv.dv, p.heads_kv, p.value_dim, entry, part);
      g.q[i] = map(queries, p.q, p.heads_q, p.head_dim, entry, g.shape.k);
      g.dout[i] = map(queries, gradients.out, p.heads_q, p.value_dim, entry, g.shape.k);
      g.terms[i] = row_terms_map<4>(static_cast<float*>(queries.data(terms, entry, 4)),
                                    queries.axes(terms, p.heads_q, p.batch, g.shape.k));
    }
    params.bias = g.seen_by_all ? DkvBiasParams{} : bias_params(p, keys.first, keys.step, first);
    params.scheduler =
        make_scheduler(p.heads_kv, batch, key_tiles, heads_in_cache(p, volume(queries.tokens())));
    params.dq.first_batch = g.map_per_batch ? first : 0;
    run_dkv_kernel<Traits>(params, p, context);
  }
}

// Extra tokens, which all queries of an undilated grid see. They are in tiles of this shape.
template <class Traits, class Geometry, class Mechanism>
void launch_extra_tokens(FmhaProblem const& p, Coord const& queries,
                         DkvParams<Geometry, Mechanism>& params, ExecutionContext const& context) {
  Coord const one = {1, 1, 1};
  bool const map_per_batch = p.grid_q[0] > 1;
  InterleavedGrid const grid{p.grid_q, {0, 0, 0}, one, one, map_per_batch};
  InterleavedGrid const extra{{1, 1, p.extra_len}, {0, 0, 0}, one, one, map_per_batch};
  Gradients const& gradients = *p.gradients;
  params.geometry.shape = {{1, 1, Traits::kTileK}, queries};
  params.geometry.seen_by_all = true;
  launch_key_tiles<Traits>(p, grid, extra,
                           KeyTensors{p.extra_k, p.extra_v, gradients.extra_k, gradients.extra_v},
                           params, ceil_div(p.extra_len, Traits::kTileK), context);
}

template <class Traits, class Mechanism>
void GridKeys<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  auto const& given = std::get<typename Mechanism::Params>(p.sparsity);
  Gradients const& gradients = *p.gradients;
  Coord const inside = element_strides(given.grid, given.dilation);
  Coord step;
  for (int axis = 0; axis < kGridAxes; ++axis) {
    step[axis] = given.dilation[axis] / inside[axis];
  }
  bool const map_per_batch = given.grid[0] > 1;
  Coord const one = {1, 1, 1};
  DkvParams<GridKeys, Mechanism> params;
  auto& g = params.geometry;
  for (int32_t i = 0; i < volume(step); ++i) {
    InterleavedGrid const grid{given.grid, box_offset(step, i), step, inside, map_per_batch};
    auto& sparsity = params.sparsity = given;
    sparsity.grid = grid.tokens();
    sparsity.dilation = inside;
    TileShape const shape =
        choose_tiles(sparsity, Traits::kTileQ, Traits::kTileK, max_box(sparsity.grid, inside),
                     tile_costs(Traits::kHeadDim), KeyTiling::kStatic);
    g.shape = {shape.k, shape.q};
    g.seen_by_all = false;
    auto const sums = device::sum_tiles(given.grid, grid.first, step, inside, shape.q);
    g.boxes = sums.boxes;
    with_query_sums<Traits>(params, p, sums, context, [&] {
      launch_key_tiles<Traits>(p, grid, grid, KeyTensors{p.k, p.v, gradients.k, gradients.v},
                               params, Mechanism::num_key_tiles(sparsity, shape), context);
      if (Traits::kAddsDq && p.extra_len > 0) {
        launch_extra_tokens<Traits>(p, shape.q, params, context);
      }
    });
  }
  // Not wanted where only the gradient of the biases is, which extra tokens do not have.
  if (!Traits::kAddsDq && p.extra_len > 0 && gradients.extra_k.data != nullptr) {
    params.sparsity = given;
    params.sparsity.dilation = one;
    TileShape const shape = choose_tiles(params.sparsity, Traits::kTileQ, Traits::kTileK,
                                         max_box(given.grid, one), tile_costs(Traits::kHeadDim));
    launch_extra_tokens<Traits>(p, shape.q, params, context);
  }
}

}  // namespace sparse_fmha::sm90
