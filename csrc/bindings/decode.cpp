// How the keys of decode attention are shared among thread blocks, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "sparse_fmha/planning/decode_parts.h"
#include "sparse_fmha/planning/few_rows.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;
using Span = std::pair<int32_t, int32_t>;

// The tiles of each group of rows of a KV head of one request.
std::vector<Span> tiles(int32_t length, int32_t capacity, int32_t len_q, int32_t group, bool causal,
                        int32_t window, int32_t split, std::optional<Span> span, int32_t block,
                        std::optional<std::vector<int32_t>> const& counts, int32_t width) {
  DecodeKeys keys;
  keys.capacity = capacity;
  keys.len_q = len_q;
  keys.group = group;
  keys.causal = causal;
  keys.window = window;
  keys.split = split;
  keys.lengths.data = &length;
  if (span) {
    keys.starts.data = &span->first;
    keys.span_lengths.data = &span->second;
  }
  if (counts) {  // one list, or one for each query; their entries are not looked at
    keys.form = block > 0 ? DecodeKeys::Form::kBlocks : DecodeKeys::Form::kTokens;
    keys.block = block;
    keys.entries.width = width;
    keys.counts.data = counts->data();
    keys.counts.query_stride = counts->size() > 1 ? 1 : 0;
    keys.by_query = counts->size() > 1;
  }
  std::vector<Span> found;
  for (int32_t row_group = 0; row_group < keys.row_groups(); ++row_group) {
    KeyRange const range = decode_tiles(keys, 0, 0, row_group);
    found.emplace_back(range.begin, range.end);
  }
  return found;
}

// The blocks that share a group in the kernel for few rows; 0 if the call takes another kernel.
int32_t few_rows_blocks(int64_t batch, int64_t heads_kv, int32_t len_q, int32_t group,
                        int32_t capacity, int32_t page, int32_t block, int32_t width, bool tokens,
                        bool by_query, bool spans, bool tree, int32_t split) {
  static int32_t const there = 0;
  DecodeKeys keys;
  keys.form = tokens      ? DecodeKeys::Form::kTokens
              : block > 0 ? DecodeKeys::Form::kBlocks
                          : DecodeKeys::Form::kRange;
  keys.capacity = capacity;
  keys.page = page;
  keys.block = block;
  keys.entries.width = width;
  keys.by_query = by_query;
  keys.starts.data = spans ? &there : nullptr;
  keys.tree.data = tree ? &there : nullptr;
  keys.len_q = len_q;
  keys.group = group;
  keys.split = split;
  return FewRows::serves(keys, batch, heads_kv)
             ? FewRows::blocks(batch * heads_kv * keys.row_groups(), most_slots(keys))
             : 0;
}

}  // namespace

void bind_decode(py::module_& m) {
  py::module_ decode = m.def_submodule("decode", "The work of decode attention.");
  py::class_<DecodeParts>(decode, "Parts", "How units are cut into parts.")
      .def(py::init<int32_t, int32_t, int32_t>(), py::arg("units"), py::arg("workers"),
           py::arg("short_parts"))
      .def("count", &DecodeParts::count)
      .def("begin", &DecodeParts::begin, py::arg("part"))
      .def("part_of", &DecodeParts::part_of, py::arg("unit"));
  decode.def("short_parts", &DecodeParts::short_parts, py::arg("rows"),
             "The most short parts of a worker.");
  decode.def("most_count", &DecodeParts::most_count, py::arg("most_units"), py::arg("workers"),
             py::arg("short_parts"), "The most parts of any number of units up to one.");
  decode.def(
      "each_unit", [](int32_t units) { return DecodeParts(units); }, py::arg("units"),
      "A part for each unit.");
  decode.def("place", &DecodeParts::place, py::arg("part"), py::arg("begins"));
  decode.def("places", &DecodeParts::places, py::arg("parts"));
  decode.def(
      "group_of",
      [](std::vector<int32_t> const& first, int32_t unit) {
        return decode_group_of(first.data(), static_cast<int32_t>(first.size() - 1), unit);
      },
      py::arg("first"), py::arg("unit"), "The group that has a unit.");
  decode.def("tiles", &tiles, py::arg("length"), py::arg("capacity"), py::arg("len_q"),
             py::arg("group"), py::arg("causal"), py::arg("window"), py::arg("split"),
             py::arg("span"), py::arg("block"), py::arg("counts"), py::arg("width"),
             "The tiles [begin, end) of each group of rows of a KV head.");
  decode.def("few_rows_blocks", &few_rows_blocks, py::arg("batch"), py::arg("heads_kv"),
             py::arg("len_q"), py::arg("group"), py::arg("capacity"), py::arg("page") = 0,
             py::arg("block") = 0, py::arg("width") = 0, py::arg("tokens") = false,
             py::arg("by_query") = false, py::arg("spans") = false, py::arg("tree") = false,
             py::arg("split") = 0,
             "The thread blocks that share a group in the kernel for few rows; 0 if the call takes "
             "another kernel.");
}
