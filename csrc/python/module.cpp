// `_C`: the host side of the library for Python. No tensors pass here.
#include <pybind11/pybind11.h>

#include "sparse_fmha/registry.h"

namespace py = pybind11;

void bind_walks(py::module_& m);

namespace {

constexpr char const* kBuildInfo =
#include "build_info.inc"
    ;

py::dict describe(sparse_fmha::KernelInfo const& info) {
  using namespace py::literals;
  return py::dict(
      "name"_a = info.name, "arch"_a = sparse_fmha::to_string(info.key.arch),
      "mechanism"_a = info.mechanism, "dtype"_a = sparse_fmha::to_string(info.key.dtype),
      "head_dim"_a = info.key.head_dim, "tile_q"_a = info.tile_q, "tile_k"_a = info.tile_k,
      "stages"_a = info.stages, "threads"_a = info.threads, "smem_bytes"_a = info.smem_bytes);
}

py::list kernel_table() {
  py::list rows;
  for (sparse_fmha::KernelRow const& row : sparse_fmha::kernel_table()) {
    rows.append(describe(row.info));
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernel table, build information and tile walks of sparse_fmha.";
  m.def("kernel_table", &kernel_table,
        "Compiled kernels, one dict each; tile sizes in tokens, 0 where chosen at run time.");
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
      "Versions of what the library was built with, and the ptxas figures of every GPU kernel.");
#ifndef SPARSE_FMHA_NO_WALKS
  bind_walks(m);
#endif
}
