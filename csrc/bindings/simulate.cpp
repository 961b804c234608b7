// The tile simulator for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "sparse_fmha/planning/backward_route.h"
#include "sparse_fmha/planning/choose_order.h"
#include "sparse_fmha/planning/class_boxes.h"
#include "sparse_fmha/planning/fit_windows.h"
#include "sparse_fmha/planning/gathered_keys.h"
#include "sparse_fmha/planning/skip_bits.h"
#include "sparse_fmha/planning/skip_tile.h"
#include "sparse_fmha/planning/tile_turns.h"
#include "sparse_fmha/planning/tiling.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;
using Triple = std::tuple<int32_t, int32_t, int32_t>;
using Problem = std::tuple<Triple, Triple, Triple, Triple, Triple>;
using Shape = std::pair<Triple, Triple>;                                  // queries, keys
using Count = std::tuple<int64_t, int64_t, int64_t, int64_t>;             // fields of TileCount
using Costs = std::tuple<double, double, double>;                         // fields of TileCosts
using Group = std::tuple<int64_t, int64_t, int64_t>;                      // fields of TileGroup
using Strides = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // batch, head, T, Y, X
using Map = std::tuple<int64_t, int64_t, Strides, bool>;                  // fields of ClassMap
using Ranked = std::tuple<Triple, Triple, Count, double>;                 // fields of RankedTiles

Coord coord(Triple const& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
Triple triple(Coord const& c) { return {c[0], c[1], c[2]}; }
Neighborhood::Params params(Problem const& p) {
  auto const& [grid, window, stride, dilation, causal] = p;
  return {coord(grid), coord(window), coord(stride), coord(dilation), coord(causal)};
}
TileCosts costs(Costs const& c) { return {std::get<0>(c), std::get<1>(c), std::get<2>(c)}; }
Count count(TileCount const& c) { return {c.query_tiles, c.visited, c.full, c.worst}; }
KeyTiling tiling(bool is_static) { return is_static ? KeyTiling::kStatic : KeyTiling::kDynamic; }

}  // namespace

void bind_tiles(py::module_& m) {
  py::module_ tiles = m.def_submodule(
      "tiles",
      "The tile simulator. A problem is (grid, window, stride, dilation, causal), each a (T, Y, "
      "X); a shape is (queries, keys); costs are (full tile, partial tile, query tile) in us.");
  tiles.def(
      "why_two_kernels",
      [](Problem const& problem, int32_t extra) -> std::optional<std::string> {
        char const* const why = why_two_kernels(params(problem), extra);
        return why != nullptr ? std::optional<std::string>(why) : std::nullopt;
      },
      py::arg("problem"), py::arg("extra"),
      "Why the gradients take two kernels where there is one of all; None: they take the one.");
  tiles.def(
      "why_two_kernels_for_blocks",
      [](int32_t block_kv) -> std::optional<std::string> {
        BlockSparse::Params lists = {};
        lists.block_kv = block_kv;
        char const* const why = why_two_kernels(lists);
        return why != nullptr ? std::optional<std::string>(why) : std::nullopt;
      },
      py::arg("block_kv"), "The same for block lists.");
  tiles.def(
      "why_not_gathered",
      [](int32_t block_q, int64_t listed, int32_t len_kv) -> std::optional<std::string> {
        char const* const why = why_not_gathered(block_q, listed, len_kv);
        return why != nullptr ? std::optional<std::string>(why) : std::nullopt;
      },
      py::arg("block_q"), py::arg("listed"), py::arg("len_kv"),
      "Why the gradients of stripes on Hopper copy no keys; None: they do. listed: the room in a "
      "group's lists.");
  tiles.def(
      "axis",
      [](Problem const& problem, int axis, int residue, Shape const& shape, bool is_static,
         int q_origin) {
        auto const walk =
            axis_tiles(params(problem), axis, residue, {coord(shape.first), coord(shape.second)},
                       tiling(is_static), q_origin);
        return std::tuple(walk.origin, walk.count, walk.full_first, walk.full);
      },
      py::arg("problem"), py::arg("axis"), py::arg("residue"), py::arg("shape"), py::arg("static"),
      py::arg("q_origin"),
      "(position of the first key tile, tiles, first full one, full ones or less than 1) that a "
      "query tile visits along one axis.");
  tiles.def(
      "count",
      [](Problem const& problem, Shape const& shape, bool is_static) {
        return count(count_tiles(params(problem), {coord(shape.first), coord(shape.second)},
                                 tiling(is_static)));
      },
      py::arg("problem"), py::arg("shape"), py::arg("static") = false,
      "(query tiles, visited, full, worst) of one head.");
  tiles.def(
      "groups",
      [](Problem const& problem, Shape const& shape, bool is_static) {
        std::vector<Group> groups;
        for (TileGroup const& g : tile_groups(
                 params(problem), {coord(shape.first), coord(shape.second)}, tiling(is_static))) {
          groups.emplace_back(g.query_tiles, g.visited, g.full);
        }
        return groups;
      },
      py::arg("problem"), py::arg("shape"), py::arg("static") = false,
      "[(query tiles, visited by each, full)], the largest first.");
  tiles.def(
      "costs",
      [](int head_dim) {
        TileCosts const c = tile_costs(head_dim);
        return Costs{c.full_tile, c.partial_tile, c.query_tile};
      },
      py::arg("head_dim"), "The cost model of an H100.");
  tiles.def(
      "max_box",
      [](Triple const& grid, Triple const& dilation) {
        return triple(max_box(coord(grid), element_strides(coord(grid), coord(dilation))));
      },
      py::arg("grid"), py::arg("dilation"),
      "The largest box that the copy engine takes of an interleaved grid.");
  tiles.def(
      "one_launch_box",
      [](Triple const& grid, Triple const& dilation) {
        Coord const tokens = coord(grid);
        return triple(max_box(tokens, one_launch_strides(tokens, coord(dilation))));
      },
      py::arg("grid"), py::arg("dilation"),
      "The largest box that the copy engine takes of a call in one launch.");
  tiles.def(
      "launches",
      [](Triple const& grid, Triple const& dilation) {
        return interleaved_launches(coord(grid), coord(dilation));
      },
      py::arg("grid"), py::arg("dilation"),
      "Launches of a kernel whose boxes have element strides; 1: the copy engine has these.");
  tiles.def(
      "skip_sizes",
      [](Problem const& given, int extra_len, int head_dim, int value_dim) {
        FmhaProblem problem;
        problem.head_dim = head_dim;
        problem.value_dim = value_dim;
        problem.extra_len = extra_len;
        Neighborhood::Params windows = params(given);
        fit_windows(windows);
        problem.sparsity = windows;
        KernelTile const tile = skip_tile(Neighborhood::kName, problem);
        SkipSizes const sizes = skip_sizes(problem, tile.tile_k, tile.head_dim);
        return std::pair{sizes.groups, sizes.words};
      },
      py::arg("problem"), py::arg("extra_len"), py::arg("head_dim"), py::arg("value_dim"),
      "(groups of 64 query rows, words of 32 tiles) of what a call that skips saves of a head.");
  tiles.def(
      "class_map",
      [](Problem const& problem, int heads, int batch, Strides const& strides) {
        auto const& [of_batch, of_head, t, y, x] = strides;
        TensorView const view{nullptr, of_batch, {t, y, x}, of_head};
        ClassMap const map = class_map(view, params(problem), heads, batch);
        ClassUnits const& units = map.units;
        return Map{map.unit,
                   map.extent,
                   {units.batch, units.head, units.axis[0], units.axis[1], units.axis[2]},
                   map.fits};
      },
      py::arg("problem"), py::arg("heads"), py::arg("batch"), py::arg("strides"),
      "(elements to a step of the offset, steps, steps to (batch, head, T, Y, X), whether "
      "coordinates fit) of the tensor maps of dilation classes; strides the same.");
  tiles.def(
      "class_kind",
      [](Problem const& problem, Triple const& residue) {
        auto const p = params(problem);
        int32_t const kind = class_kind(p, coord(residue));
        return std::pair(kind, triple(class_length(p, kind)));
      },
      py::arg("problem"), py::arg("residue"),
      "(which of the maps has a dilation class, its elements per axis).");
  tiles.def(
      "order",
      [](Problem const& problem, Shape const& shape, int blocks) {
        Neighborhood::Params const p = params(problem);
        TileShape const tile_shape{coord(shape.first), coord(shape.second)};
        TileOrder const order = choose_order(p, tile_shape, blocks);
        std::vector<int32_t> indices(Neighborhood::num_query_tiles(p, tile_shape));
        for (size_t i = 0; i < indices.size(); ++i) {
          indices[i] = order.at(static_cast<int32_t>(i), static_cast<int32_t>(indices.size()));
        }
        return indices;
      },
      py::arg("problem"), py::arg("shape"), py::arg("blocks"),
      "Row-major indices of a head's query tiles, the one that is taken last first.");
  tiles.def("next_in_turns", &next_in_turns, py::arg("index"), py::arg("blocks"),
            "The tile that a thread block takes after tile `index`.");
  tiles.def(
      "boxes",
      [](int rows, Triple const& max_extent) {
        std::vector<Triple> boxes;
        for (Coord const& box : tile_boxes(rows, coord(max_extent))) {
          boxes.push_back(triple(box));
        }
        return boxes;
      },
      py::arg("rows"), py::arg("max_extent"), "Boxes of that many tokens.");
  tiles.def(
      "rank",
      [](Problem const& problem, int rows_q, int rows_k, Triple const& max_extent,
         Costs const& of_tile, bool is_static) {
        std::vector<Ranked> ranking;
        for (RankedTiles const& r : rank_tiles(params(problem), rows_q, rows_k, coord(max_extent),
                                               costs(of_tile), tiling(is_static))) {
          ranking.emplace_back(triple(r.shape.q), triple(r.shape.k), count(r.count), r.cost);
        }
        return ranking;
      },
      py::arg("problem"), py::arg("rows_q"), py::arg("rows_k"), py::arg("max_extent"),
      py::arg("costs"), py::arg("static") = false,
      "[(queries, keys, count, us of one block for one head)] of all legal pairs, the best first.");
  tiles.def(
      "choose",
      [](Problem const& problem, int rows_q, int rows_k, Triple const& max_extent,
         Costs const& of_tile) {
        TileShape const shape =
            choose_tiles(params(problem), rows_q, rows_k, coord(max_extent), costs(of_tile));
        return Shape{triple(shape.q), triple(shape.k)};
      },
      py::arg("problem"), py::arg("rows_q"), py::arg("rows_k"), py::arg("max_extent"),
      py::arg("costs"), py::call_guard<py::gil_scoped_release>(),
      "The pair that the kernel takes.");
}
