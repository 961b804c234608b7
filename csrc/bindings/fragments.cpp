// Where fragments of mma.sync lie in shared memory, for the tests.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "sparse_fmha/sm80/backward/fragments.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha::sm80;

std::pair<int, int> pair(Chunk const& at) { return {at.row, at.chunk}; }

int swizzled_in(int dim, int row, int chunk) {
  switch (dim) {
    case 32:
      return swizzled<32>({row, chunk});
    case 64:
      return swizzled<64>({row, chunk});
    case 128:
      return swizzled<128>({row, chunk});
    case 256:
      return swizzled<256>({row, chunk});
  }
  throw std::invalid_argument("dim must be 32, 64, 128 or 256");
}

}  // namespace

void bind_fragments(py::module_& m) {
  py::module_ fragments = m.def_submodule("fragments", "Fragments of mma.sync in shared memory.");
  fragments.def(
      "left_chunk", [](int lane) { return pair(left_chunk(lane)); }, py::arg("lane"),
      "Row and chunk of eight elements that a lane addresses in a left factor.");
  fragments.def(
      "right_chunk", [](int lane) { return pair(right_chunk(lane)); }, py::arg("lane"),
      "The same in a right factor.");
  fragments.def("swizzled", &swizzled_in, py::arg("dim"), py::arg("row"), py::arg("chunk"),
                "Index of a chunk's first element in a tile whose rows have `dim` elements.");
  fragments.def("advanced", &advanced, py::arg("address"), py::arg("step"),
                "The address 16 * step elements further in a row.");
}
