// Launches of mechanisms on a grid of tokens.
//
// Where boxes have element strides, one launch computes one interleaved grid
// (planning/interleaved.h), and with three token axes at most kMaxMaps batch entries. By maps of
// dilation classes one launch computes everything.
#pragma once

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/planning/choose_order.h"
#include "sparse_fmha/planning/interleaved.h"
#include "sparse_fmha/sm90/forward/run_kernel.h"
#include "sparse_fmha/sm90/geometry/grid/boxes.h"
#include "sparse_fmha/sm90/geometry/grid/grid.h"

namespace sparse_fmha::sm90 {

// What does not depend on how boxes lie in memory: tiles, and the extra tokens.
template <class Traits, class Params>
void set_tiles(FmhaProblem const& p, TileShape const& shape, Params& g) {
  g.shape = shape;
  g.q_bits = box_bits(shape.q);
  g.k_bits = box_bits(shape.k);
  g.extra_len = p.extra_len;
  if (p.extra_len > 0) {
    auto extra_map = [&](TensorView const& view, int32_t dim) {
      return sequence_tensor_map(view, p.dtype, p.extra_len, p.heads_kv, p.batch, dim,
                                 Traits::kTileK);
    };
    g.extra_k = extra_map(p.extra_k, p.head_dim);
    g.extra_v = extra_map(p.extra_v, p.value_dim);
  }
}

// The values of rows at {first + i * step}.
template <class Traits, class Params>
void set_rows(FmhaProblem const& p, Coord const& first, Coord const& step, Params& g) {
  int64_t stride = p.heads_q;
  g.rows = Traits::row_values(p);
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    g.rows += first[axis] * stride;
    g.rows_axis[axis] = step[axis] * stride;
    stride *= p.grid_q[axis];
  }
  g.rows_batch = stride;
}

// As many heads as have keys and values of `grid` that fit in the L2 cache together.
inline int32_t heads_together(FmhaProblem const& p, Coord const& grid) {
  return heads_in_cache(2.0 * volume(grid) * (p.head_dim + p.value_dim));
}

template <class Traits, class Mechanism>
void launch_interleaved(FmhaProblem const& p, InterleavedGrid const& grid,
                        ExecutionContext const& context) {
  using Geometry = Grid<Traits, Mechanism>;
  Coord const& first = grid.first;
  Coord const& step = grid.step;
  KernelParams<Geometry, Mechanism> params;
  auto& sparsity = params.sparsity = grid.params;
  auto& g = params.geometry;
  set_tiles<Traits>(p, grid.shape, g);
  set_rows<Traits>(p, first, step, g);

  bool const map_per_batch = sparsity.grid[0] > 1;
  auto map = [&](TensorView const& tensor, int32_t heads, int32_t dim, Coord const& box,
                 int32_t batch) {
    TensorView const view = interleaved(tensor, first, step);
    auto axis = [&](int a) {
      return MapAxis{sparsity.grid[a], view.axis_stride[a], static_cast<uint32_t>(box[a]),
                     static_cast<uint32_t>(sparsity.dilation[a])};
    };
    MapAxis const last = map_per_batch ? axis(0) : MapAxis{p.batch, view.batch_stride};
    auto* data = static_cast<char*>(view.data) + 2 * batch * view.batch_stride;
    return make_tensor_map<4>(data, p.dtype, dim,
                              {MapAxis{heads, view.head_stride}, axis(2), axis(1), last});
  };
  g.places.map_per_batch = map_per_batch;

  int32_t const group = heads_together(p, sparsity.grid);
  int32_t const q_tiles = Mechanism::num_query_tiles(sparsity, g.shape);
  g.order = choose_order(sparsity, g.shape, multiprocessor_count() / group);
  int32_t const batch_step = map_per_batch ? Geometry::Places::kMaxMaps : p.batch;
  for (g.first_batch = 0; g.first_batch < p.batch; g.first_batch += batch_step) {
    int32_t const batch = std::min(batch_step, p.batch - g.first_batch);
    for (int32_t i = 0; i < (map_per_batch ? batch : 1); ++i) {
      for (int t = 0; t < Traits::kQueryTensors; ++t) {
        g.q[t][i] = map(Traits::queries(p, t), p.heads_q, Traits::query_dim(p, t),
                        warpgroup_box(g.shape.q), g.first_batch + i);
      }
      g.k[i] = map(p.k, p.heads_kv, p.head_dim, g.shape.k, g.first_batch + i);
      g.v[i] = map(p.v, p.heads_kv, p.value_dim, g.shape.k, g.first_batch + i);
      g.out[i] = map(Traits::output(p), p.heads_q, Traits::output_dim(p), warpgroup_box(g.shape.q),
                     g.first_batch + i);
    }
    params.scheduler = make_scheduler(p.heads_q, batch, q_tiles, group);
    FmhaProblem part = p;
    if (p.skip_threshold != nullptr) {
      part.skip_threshold += g.first_batch;
      part.skip_counts += int64_t{2} * g.first_batch * p.heads_q;
    }
    if (p.skip_bits != nullptr) {
      SkipSizes const sizes = skip_sizes(p, Traits::kTileK, Traits::kHeadDim);
      int64_t const row = int64_t{g.first_batch} * p.heads_q * sizes.groups + grid.first_group;
      part.skip_bits += row * sizes.words;
    }
    if (Traits::kKeyBias && p.key_bias.data != nullptr) {
      part.key_bias.data += g.first_batch * p.key_bias.batch_stride;
      int64_t key = 1;
      for (int axis = kGridAxes - 1; axis >= 0; --axis) {
        part.key_bias.data += first[axis] * key;
        params.bias.axis_stride[axis] = step[axis] * key;
        key *= p.grid_kv[axis];
      }
    }
    run_kernel<Traits>(params, part, context);
  }
}

// All dilation classes, heads and batch entries.
template <class Traits, class Mechanism>
void launch_classes(FmhaProblem const& p, ExecutionContext const& context) {
  KernelParams<Grid<Traits, Mechanism>, Mechanism> params;
  auto& g = params.geometry;
  auto const& sparsity = params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
  constexpr Coord kOne = {1, 1, 1};
  set_tiles<Traits>(p,
                    choose_tiles(sparsity, Traits::kTileQ, Traits::kTileK,
                                 max_box(sparsity.grid, kOne), tile_costs(Traits::kHeadDim)),
                    g);
  set_rows<Traits>(p, {0, 0, 0}, kOne, g);
  g.first_batch = 0;
  auto place = [&](TensorView const& view, int32_t heads, int32_t dim, Coord const& box,
                   CUtensorMap(&maps)[kClassKinds], ClassUnits& units) {
    ClassMap const of = class_map(view, sparsity, heads, p.batch);
    for (int32_t kind = 0; kind < kClassKinds; ++kind) {
      Coord const length = class_length(sparsity, kind);
      auto axis = [&](int a) {  // no class has the shorter length where that is 0
        return MapAxis{std::max(length[a], 1), view.axis_stride[a] * sparsity.dilation[a],
                       static_cast<uint32_t>(box[a])};
      };
      maps[kind] = make_tensor_map<4>(view.data, p.dtype, dim,
                                      {axis(2), axis(1), axis(0), MapAxis{of.extent, of.unit}});
    }
    units = of.units;
  };
  Coord const part = warpgroup_box(g.shape.q);
  for (int i = 0; i < Traits::kQueryTensors; ++i) {
    place(Traits::queries(p, i), p.heads_q, Traits::query_dim(p, i), part, g.q[i], g.places.q[i]);
  }
  place(p.k, p.heads_kv, p.head_dim, g.shape.k, g.k, g.places.k);
  place(p.v, p.heads_kv, p.value_dim, g.shape.k, g.v, g.places.v);
  place(Traits::output(p), p.heads_q, Traits::output_dim(p), part, g.out, g.places.out);

  int32_t const group = heads_together(p, sparsity.grid);
  int32_t const q_tiles = Mechanism::num_query_tiles(sparsity, g.shape);
  g.order = choose_order(sparsity, g.shape, multiprocessor_count() / group);
  params.scheduler = make_scheduler(p.heads_q, p.batch, q_tiles, group);
  run_kernel<Traits>(params, p, context);
}

template <class Traits, class Mechanism>
void Grid<Traits, Mechanism>::launch(FmhaProblem const& p, ExecutionContext const& context) {
  if constexpr (kByClass) {
    launch_classes<Traits, Mechanism>(p, context);
  } else {
    auto const grids = interleaved_grids(std::get<typename Mechanism::Params>(p.sparsity),
                                         Traits::kTileQ, Traits::kTileK, Traits::kHeadDim);
    for (InterleavedGrid const& grid : grids) {
      launch_interleaved<Traits, Mechanism>(p, grid, context);
    }
  }
}

}  // namespace sparse_fmha::sm90
