// The walks of the mechanisms for Python, for the tests and the simulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "sparse_fmha/mechanisms/dense.h"
#include "sparse_fmha/mechanisms/neighborhood.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;
using Triple = std::tuple<int32_t, int32_t, int32_t>;
using Tile = std::pair<Triple, Triple>;                    // residue, origin
using Visits = std::tuple<int, int, std::vector<Triple>>;  // partial, full, origins

Coord coord(Triple const& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
Triple triple(Coord const& c) { return {c[0], c[1], c[2]}; }

template <class Walk>
Visits visits(Walk const& walk) {
  std::vector<Triple> origins;
  for (int32_t i = 0; i < walk.num_partial + walk.num_full; ++i) {
    origins.push_back(triple(walk.tile(i)));
  }
  return {walk.num_partial, walk.num_full, origins};
}

// A mechanism with its parameters and the tile shape, as one Python object.
template <class M>
struct Bound {
  static_assert(is_mechanism<M>());
  typename M::Params params;
  TileShape shape;

  int num_query_tiles() const { return M::num_query_tiles(params, shape); }
  int num_key_tiles() const { return M::num_key_tiles(params, shape); }
  Tile query_tile(int i) const {
    QueryTile const t = M::query_tile(params, shape, i);
    return {triple(t.residue), triple(t.origin)};
  }
  Tile key_tile(int i) const {
    KeyTile const t = M::key_tile(params, shape, i);
    return {triple(t.residue), triple(t.origin)};
  }
  Visits walk(int i) const {
    return visits(M::walk(params, shape, M::query_tile(params, shape, i)));
  }
  Visits walk_transposed(int i) const {
    return visits(M::walk_transposed(params, shape, M::key_tile(params, shape, i)));
  }
  Triple token(Triple const& residue, Triple const& position) const {
    return triple(M::token(params, coord(residue), coord(position)));
  }
  std::vector<std::vector<bool>> visible(Triple const& residue, std::vector<Triple> const& queries,
                                         std::vector<Triple> const& keys) const {
    std::vector<std::vector<bool>> mask;
    for (Triple const& q : queries) {
      typename M::Row const row = M::row(params, coord(residue), coord(q));
      std::vector<bool>& seen = mask.emplace_back();
      for (Triple const& k : keys) {
        seen.push_back(M::visible(params, row, coord(k)));
      }
    }
    return mask;
  }
};

template <class M>
py::class_<Bound<M>> bind(py::module_& m, char const* name) {
  using B = Bound<M>;
  return py::class_<B>(m, name)
      .def("num_query_tiles", &B::num_query_tiles)
      .def("query_tile", &B::query_tile, py::arg("index"), "(residue, origin) of a query tile.")
      .def("num_key_tiles", &B::num_key_tiles)
      .def("key_tile", &B::key_tile, py::arg("index"), "(residue, origin) of a key tile.")
      .def("walk", &B::walk, py::arg("query_tile"),
           "(partial, full, origins) of the key tiles that a query tile visits.")
      .def("walk_transposed", &B::walk_transposed, py::arg("key_tile"),
           "(partial, full, origins) of the query tiles that visit a key tile.")
      .def("token", &B::token, py::arg("residue"), py::arg("position"),
           "Token coordinates of a position in a dilation class.")
      .def("visible", &B::visible, py::arg("residue"), py::arg("queries"), py::arg("keys"),
           "Element mask [queries][keys] of positions in one dilation class.");
}

template <class M>
void bind_prefix(py::module_& m, char const* name) {
  bind<M>(m, name).def(py::init([](int len_q, int len_kv, int tile_q, int tile_k) {
                         return Bound<M>{{len_q, len_kv}, {{1, 1, tile_q}, {1, 1, tile_k}}};
                       }),
                       py::arg("len_q"), py::arg("len_kv"), py::arg("tile_q"), py::arg("tile_k"));
}

}  // namespace

void bind_walks(py::module_& m) {
  py::module_ walks = m.def_submodule("walks",
                                      "Which tiles each mechanism visits. Coordinates are (T, Y, "
                                      "X); walks have partial tiles first.");
  bind_prefix<Dense>(walks, "Dense");
  bind_prefix<Causal>(walks, "Causal");
  bind<Neighborhood>(walks, "Neighborhood")
      .def(py::init([](Triple const& grid, Triple const& window, Triple const& stride,
                       Triple const& dilation, Triple const& causal, Triple const& tile_q,
                       Triple const& tile_k) {
             return Bound<Neighborhood>{
                 {coord(grid), coord(window), coord(stride), coord(dilation), coord(causal)},
                 {coord(tile_q), coord(tile_k)}};
           }),
           py::arg("grid"), py::arg("window"), py::arg("stride"), py::arg("dilation"),
           py::arg("causal"), py::arg("tile_q"), py::arg("tile_k"));
}
