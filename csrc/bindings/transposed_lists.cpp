// Transposed lists for Python, so that tests can check the Hopper kernel's logic without a GPU; and
// the bits of kept blocks, from which they may be made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "list_buffers.h"
#include "sparse_fmha/planning/kept_blocks.h"
#include "sparse_fmha/planning/transposed_lists.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;

// One batch entry, one head.
template <class Mechanism>
class OfKeys {
 public:
  // The steps that see a part of 64 keys, and whether they are masked.
  std::vector<std::pair<int32_t, bool>> steps(int32_t part) const {
    std::vector<std::pair<int32_t, bool>> result;
    for (int32_t step = 0; step < ceil_div(params_.len_q, kStepRows); ++step) {
      PartUse const use = part_use(params_, lists_, row_of(step), part, step);
      if (use.seen) {
        result.emplace_back(step, use.masked);
      }
    }
    return result;
  }

  // For each of 64 keys, which of a step's 64 queries see it: computed as by a warp of the kernel,
  // and read as by threads of the accumulator.
  std::vector<uint64_t> seen(int32_t part, int32_t step) const {
    int64_t const row = row_of(step);
    int32_t const first_key = part * kPartKeys;
    auto entry = [&](int32_t i) { return tile_entry(params_, lists_, row, first_key, i); };
    std::vector<uint64_t> keys(kPartKeys);
    int32_t const first_query = step * kStepRows;
    if constexpr (std::is_same_v<Mechanism, BlockSparse>) {
      if (have_one_limit(params_, first_query, first_key + kPartKeys) &&
          !has_bitmask(params_, lists_, row, first_key, kPartKeys)) {
        for (int32_t key = 0; key < kPartKeys; ++key) {
          bool const seen = lists_key(params_, lists_, row, first_key + key) &&
                            first_key + key < BlockSparse::limit(params_, first_query);
          keys[key] = seen ? ~uint64_t{0} : 0;
        }
        return keys;
      }
    }
    for (int32_t first = 0; first < kPartKeys; first += 32) {
      std::array<std::array<uint32_t, 32>, 2> halves;
      for (int32_t half = 0; half < 2; ++half) {
        for (int32_t lane = 0; lane < 32; ++lane) {
          halves[half][lane] = seen_keys(params_, lists_, row, entry, first_key, first,
                                         first_query + query_of_lane(half, lane));
        }
        for (int32_t distance = 16; distance > 0; distance /= 2) {
          auto const before = halves[half];
          for (int32_t lane = 0; lane < 32; ++lane) {
            halves[half][lane] = exchange(before[lane], before[lane ^ distance], lane, distance);
          }
        }
      }
      for (int32_t lane = 0; lane < 32; ++lane) {
        for (int32_t thread = 0; thread < 4; ++thread) {
          uint32_t const bits = halves[thread / 2][lane] >> thread % 2 * 16;
          for (int32_t i = 0; i < 16; ++i) {
            int32_t const column = i / 2 * 8 + thread * 2 + i % 2;
            keys[first + lane] |= uint64_t{bits >> i & 1} << column;
          }
        }
      }
    }
    return keys;
  }

 protected:
  int64_t row_of(int32_t step) const { return sparse_fmha::row_of(params_, step * kStepRows); }

  typename Mechanism::Params params_;
  std::vector<uint32_t> full_;
  TransposedLists lists_ = {};
};

class ListsOfKeys : public OfKeys<BlockSparse> {
 public:
  ListsOfKeys(int32_t len_q, int32_t len_kv, int32_t block_q, int32_t block_kv, bool causal,
              py::buffer const& counts, py::buffer const& indices, int32_t width,
              py::buffer const& partial_counts, py::buffer const& partial_indices,
              py::buffer const& bits, int32_t partial_width)
      : buffers_(counts, indices, width, partial_counts, partial_indices, bits, partial_width) {
    params_ = buffers_.params(len_q, len_kv, block_q, block_kv, causal);
    mark_rows();
  }

 private:
  // Same as csrc/device/transpose_lists.cu does on the device.
  void mark_rows() {
    int32_t const key_blocks = ceil_div(params_.len_kv, params_.block_kv);
    int32_t const rows = ceil_div(params_.len_q, params_.block_q);
    int32_t const words = ceil_div(key_blocks, 32);
    full_.resize(int64_t{rows} * words);
    partial_.resize(full_.size());
    ranks_.resize(full_.size());
    slots_.resize(int64_t{rows} * params_.partial.width);
    auto each = [&](BlockSparse::Lists const& lists, int64_t row, auto body) {
      for (int32_t i = 0; i < BlockSparse::count(lists, row); ++i) {
        int32_t const block = lists.indices[row * lists.width + i];
        if (block >= 0 && block < key_blocks) {
          body(i, row * words + block / 32, block % 32);
        }
      }
    };
    for (int64_t row = 0; row < rows; ++row) {
      each(params_.full, row, [&](int32_t, int64_t at, int32_t bit) { full_[at] |= 1u << bit; });
      each(params_.partial, row,
           [&](int32_t, int64_t at, int32_t bit) { partial_[at] |= 1u << bit; });
      for (int64_t at = row * words + 1; at < (row + 1) * words; ++at) {
        ranks_[at] = ranks_[at - 1] + count_bits(partial_[at - 1]);
      }
      each(params_.partial, row, [&](int32_t i, int64_t at, int32_t bit) {
        int32_t const rank = ranks_[at] + count_bits(partial_[at] & first_columns(bit));
        slots_[row * params_.partial.width + rank] = i;
      });
    }
    lists_.full = full_.data();
    lists_.partial = partial_.data();
    lists_.ranks = ranks_.data();
    lists_.slots = slots_.data();
    lists_.words = words;
  }

  ListBuffers buffers_;
  std::vector<uint32_t> partial_;
  std::vector<int32_t> ranks_, slots_;
};

class StripesOfKeys : public OfKeys<Stripe> {
 public:
  StripesOfKeys(int32_t len_q, int32_t len_kv, int32_t block_q, int32_t range_size, bool causal,
                py::buffer const& counts, py::buffer const& columns, int32_t width,
                py::buffer const& range_counts, py::buffer const& range_starts, int32_t range_width)
      : counts_(counts.request()),
        columns_(columns.request()),
        range_counts_(range_counts.request()),
        range_starts_(range_starts.request()) {
    auto ints = [](py::buffer_info const& buffer) {
      return static_cast<int32_t const*>(buffer.ptr);
    };
    params_ = {len_q,
               len_kv,
               block_q,
               range_size,
               causal,
               {ints(counts_), ints(columns_), width},
               {range_width > 0 ? ints(range_counts_) : nullptr, ints(range_starts_), range_width},
               0,
               0};
    // Same as csrc/device/transpose_lists.cu does on the device.
    int32_t const groups = ceil_div(len_q, block_q);
    lists_.words = ceil_div(len_kv, 32);
    full_.resize(int64_t{groups} * lists_.words);
    for (int64_t group = 0; group < groups; ++group) {
      StripeStream const stream = stripe_stream(params_, group);
      auto set = [&](int32_t key) {
        if (key >= 0 && key < len_kv) {
          full_[group * lists_.words + key / 32] |= 1u << key % 32;
        }
      };
      for (int32_t i = 0; i < stream.num_columns; ++i) {
        set(stream.columns[i]);
      }
      for (int32_t i = 0; i < stream.num_runs; ++i) {
        for (int32_t key = 0; stream.runs[i] >= 0 && key < range_size; ++key) {
          set(stream.runs[i] + key);
        }
      }
    }
    lists_.full = full_.data();
  }

 private:
  py::buffer_info counts_, columns_, range_counts_, range_starts_;
};

// The words of each group of 64 query rows, in blocks of 16 keys.
std::vector<std::vector<uint32_t>> kept_words(int32_t len_q, int32_t len_kv, bool causal,
                                              int32_t tile,
                                              std::vector<std::vector<uint32_t>> const& skipped) {
  BlockSparse::Params params = {};
  params.len_q = len_q;
  params.len_kv = len_kv;
  params.block_q = 64;
  params.block_kv = 16;
  params.causal = causal;
  std::vector<std::vector<uint32_t>> kept(skipped.size());
  for (size_t group = 0; group < kept.size(); ++group) {
    for (int32_t word = 0; word < ceil_div(len_kv, 16 * 32); ++word) {
      kept[group].push_back(
          kept_blocks(params, skipped[group].data(), tile / 16, static_cast<int32_t>(group), word));
    }
  }
  return kept;
}

}  // namespace

void bind_transposed_lists(py::module_& m) {
  py::class_<ListsOfKeys>(m, "ListsOfKeys",
                          "Which query rows see which keys, by int32 lists of key blocks.")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, bool, py::buffer, py::buffer, int32_t,
                    py::buffer, py::buffer, py::buffer, int32_t>(),
           py::arg("len_q"), py::arg("len_kv"), py::arg("block_q"), py::arg("block_kv"),
           py::arg("causal"), py::arg("counts"), py::arg("indices"), py::arg("width"),
           py::arg("partial_counts"), py::arg("partial_indices"), py::arg("bits"),
           py::arg("partial_width"))
      .def("steps", &ListsOfKeys::steps, py::arg("part"))
      .def("seen", &ListsOfKeys::seen, py::arg("part"), py::arg("step"));
  py::class_<StripesOfKeys>(m, "StripesOfKeys",
                            "Which query rows see which keys, by int32 lists of keys and of runs.")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, bool, py::buffer, py::buffer, int32_t,
                    py::buffer, py::buffer, int32_t>(),
           py::arg("len_q"), py::arg("len_kv"), py::arg("block_q"), py::arg("range_size"),
           py::arg("causal"), py::arg("counts"), py::arg("columns"), py::arg("width"),
           py::arg("range_counts"), py::arg("range_starts"), py::arg("range_width"))
      .def("steps", &StripesOfKeys::steps, py::arg("part"))
      .def("seen", &StripesOfKeys::seen, py::arg("part"), py::arg("step"));
  m.def("kept_blocks", &kept_words, py::arg("len_q"), py::arg("len_kv"), py::arg("causal"),
        py::arg("tile"), py::arg("skipped"),
        "Bits of the blocks of 16 keys that each group of 64 query rows keeps, by those of the "
        "tiles that it skipped.");
}
