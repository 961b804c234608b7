// The stages of block lists for Python, so that tests can check the Hopper kernel's logic without a
// GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "list_buffers.h"
#include "sparse_fmha/planning/kept_lists.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;
using Counts = std::tuple<int32_t, int32_t, int32_t>;  // StreamStages

StreamStages stages_of(Counts const& c) { return {std::get<0>(c), std::get<1>(c), std::get<2>(c)}; }

std::vector<std::pair<int32_t, int32_t>> stream_places(Counts const& counts) {
  StreamStages const stages = stages_of(counts);
  std::vector<std::pair<int32_t, int32_t>> places;
  for (int32_t i = 0; i < stages.total(); ++i) {
    StreamPlace const place = stream_place(stages, i);
    places.emplace_back(place.stream, place.index);
  }
  return places;
}

// For each stage of a consumer: its index among all stages, and whether it follows one of the other
// consumer.
std::vector<std::pair<int32_t, bool>> consumer_places(Counts const& counts, int32_t consumer) {
  ListWalk const walk = list_walk(stages_of(counts), {}, {}, consumer);
  std::vector<std::pair<int32_t, bool>> places;
  for (int32_t i = 0; i < walk.num_full; ++i) {
    places.emplace_back(walk.position(i), walk.follows_other(i));
  }
  return places;
}

// The lists of one query tile as the kernel reads them, in stages of `tile_k` keys. One batch
// entry, one head.
class QueryTileLists {
 public:
  QueryTileLists(int32_t len_q, int32_t len_kv, int32_t block_q, int32_t block_kv, bool causal,
                 int32_t tile_k, int32_t q_tile, py::buffer const& counts,
                 py::buffer const& indices, int32_t width, py::buffer const& partial_counts,
                 py::buffer const& partial_indices, py::buffer const& bits, int32_t partial_width)
      : buffers_(counts, indices, width, partial_counts, partial_indices, bits, partial_width),
        params_(buffers_.params(len_q, len_kv, block_q, block_kv, causal)),
        sizes_(box_sizes(block_kv, tile_k)),
        tile_k_(tile_k),
        q_tile_(q_tile) {
    if (block_q == 64) {
      merge();
    }
    // The plan formally includes the tiles before this one, which are not read.
    ListPlan const plan = {nullptr, merged_.data(), merged_counts_.data(), 0, 0};
    find_streams(params_, plan, 0, 0, q_tile, streams_);
    stages_ = count_stages(sizes_, streams_);
  }

  Counts stages() const { return {stages_.both, stages_.first, stages_.second}; }

  // First keys of the boxes of a stage; 2^30 for a box that does not exist.
  std::vector<int32_t> origins(int32_t stream, int32_t stage) const {
    std::vector<int32_t> result;
    for (int32_t b = 0; b < 1 << sizes_.log2_boxes; ++b) {
      result.push_back(box_origin(params_, sizes_, list_box(sizes_, streams_[stream], stage, b)));
    }
    return result;
  }

  // Whether a stage is masked and, if so, the words of visible columns for each of a consumer's 64
  // rows.
  std::pair<bool, std::vector<std::vector<uint32_t>>> seen(int32_t stream, int32_t stage,
                                                           int32_t consumer) const {
    std::vector<int32_t> const origin = origins(stream, stage);
    std::vector<uint8_t> bits(128 * 16);  // in the producer's layout
    uint32_t with_bits = 0;
    bool const masked = walk(consumer).is_masked(stage + (stream == 0 ? 0 : stages_.both));
    for (size_t b = 0; b < origin.size(); ++b) {
      ListBox const box = list_box(sizes_, streams_[stream], stage, static_cast<int32_t>(b));
      bool const partial = origin[b] != kAbsent && box.entry < streams_[stream].partials;
      if (partial) {
        with_bits |= 1u << b;
        uint8_t const* const from =
            streams_[stream].bits + box.entry * BlockSparse::bits_bytes(params_);
        std::copy_n(from, BlockSparse::bits_bytes(params_),
                    bits.data() + b * BlockSparse::bits_bytes(params_));
      }
    }
    std::vector<std::vector<uint32_t>> rows;
    for (int32_t row = 0; masked && row < 64; ++row) {
      int32_t const limit = BlockSparse::limit(params_, q_tile_ * 128 + consumer * 64 + row);
      int32_t const row_of_bits = row + (params_.block_q == 128 ? consumer * 64 : 0);
      std::vector<uint32_t> words;
      for (int32_t word = 0; word < tile_k_ / 32; ++word) {
        words.push_back(seen_columns(params_, sizes_, origin.data(), with_bits, bits.data(),
                                     row_of_bits, limit, word));
      }
      rows.push_back(words);
    }
    return {masked, rows};
  }

  // The boxes, counted from the first key, that a consumer keeps if it skips stages by these bits,
  // and the bytes of 64 rows of their bitmasks; no bytes of boxes that have none.
  std::vector<std::pair<int32_t, std::vector<int32_t>>> kept(
      int32_t consumer, std::vector<uint32_t> const& skipped) const {
    std::vector<std::pair<int32_t, std::vector<int32_t>>> boxes;
    int32_t const group = 2 * q_tile_ + consumer;
    auto const stages = group_stages(streams_, stages_, group, skipped.data());
    for (int32_t i = 0; i < stages.total() << sizes_.log2_boxes; ++i) {
      KeptBox const box = kept_box(params_, sizes_, stages, group, i);
      if (box.block < 0) {
        continue;
      }
      std::vector<int32_t> bytes;
      for (int32_t row = 0; row < 64 && box.bits != nullptr; ++row) {
        uint8_t const* const from = box.bits + row * (params_.block_kv / 8);
        bytes.insert(bytes.end(), from, from + (1 << sizes_.log2_box) / 8);
      }
      boxes.emplace_back(box.block, bytes);
    }
    return boxes;
  }

 private:
  // Same as Lists::look_through().
  WholeStages whole(int32_t stream) const {
    ListStream const& from = streams_[stream];
    int32_t const first_query = q_tile_ * 128 + (stream == 2 ? 64 : 0);
    int32_t i = 0;
    while (i < from.entries - from.partials && is_whole(params_, from.full[i], first_query)) {
      ++i;
    }
    return whole_stages(sizes_, from, i);
  }
  ListWalk walk(int32_t consumer) const {
    return list_walk(stages_, whole(0), whole(1 + consumer), consumer);
  }

  // Same as csrc/device/list_plan.cu does on the device, for this tile.
  void merge() {
    int32_t const blocks = ceil_div(params_.len_q, 64);
    int32_t const key_blocks = ceil_div(params_.len_kv, params_.block_kv);
    std::vector<int32_t> who(key_blocks);
    for (int32_t w = 0; w < 2 && 2 * q_tile_ + w < blocks; ++w) {
      int32_t const row = 2 * q_tile_ + w;
      for (int32_t i = 0; i < BlockSparse::count(params_.full, row); ++i) {
        int32_t const block = params_.full.indices[int64_t{row} * params_.full.width + i];
        if (block >= 0 && block < key_blocks) {
          who[block] |= 1 << w;
        }
      }
    }
    merged_.resize(2 * (q_tile_ + 1) * static_cast<size_t>(params_.full.width));
    merged_counts_.resize(3 * (q_tile_ + 1));
    size_t at = 2 * q_tile_ * static_cast<size_t>(params_.full.width);
    int const wanted[] = {3, 1, 2};
    for (int part = 0; part < 3; ++part) {
      for (int32_t block = 0; block < key_blocks; ++block) {
        if (who[block] == wanted[part]) {
          merged_[at++] = block;
          ++merged_counts_[3 * q_tile_ + part];
        }
      }
    }
  }

  ListBuffers buffers_;
  BlockSparse::Params params_;
  BoxSizes sizes_;
  int32_t tile_k_;
  int32_t q_tile_;
  std::vector<int32_t> merged_;
  std::vector<int32_t> merged_counts_;
  ListStream streams_[3] = {};
  StreamStages stages_ = {};
};

}  // namespace

void bind_lists(py::module_& m) {
  m.def("stream_places", &stream_places, py::arg("stages"),
        "(stream, index in it) of each stage of a query tile with (both, first, second) stages.");
  m.def("consumer_places", &consumer_places, py::arg("stages"), py::arg("consumer"),
        "(place among all, whether it follows one of the other's) of each stage of a consumer.");
  py::class_<QueryTileLists>(m, "QueryTileLists",
                             "The stages of one query tile of 128 rows, from int32 lists.")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, bool, int32_t, int32_t, py::buffer,
                    py::buffer, int32_t, py::buffer, py::buffer, py::buffer, int32_t>(),
           py::arg("len_q"), py::arg("len_kv"), py::arg("block_q"), py::arg("block_kv"),
           py::arg("causal"), py::arg("tile_k"), py::arg("q_tile"), py::arg("counts"),
           py::arg("indices"), py::arg("width"), py::arg("partial_counts"),
           py::arg("partial_indices"), py::arg("bits"), py::arg("partial_width"))
      .def_property_readonly("stages", &QueryTileLists::stages)
      .def("origins", &QueryTileLists::origins, py::arg("stream"), py::arg("stage"))
      .def("seen", &QueryTileLists::seen, py::arg("stream"), py::arg("stage"), py::arg("consumer"))
      .def("kept", &QueryTileLists::kept, py::arg("consumer"), py::arg("skipped"));
}
