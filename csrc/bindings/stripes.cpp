// The stages of stripes for Python, so that tests can check the Hopper kernel's logic without a
// GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "sparse_fmha/planning/stripe_stages.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;

// The lists of one query tile as the kernel reads them, in stages of `tile_k` keys. One batch
// entry, one head.
class QueryTileStripes {
 public:
  using Rows = std::vector<std::vector<int32_t>>;  // one list per group, all of one length

  QueryTileStripes(int32_t len_q, int32_t len_kv, int32_t block_q, int32_t range_size, bool causal,
                   int32_t tile_k, int32_t q_tile, std::vector<int32_t> counts, Rows const& columns,
                   std::vector<int32_t> range_counts, Rows const& ranges)
      : counts_(std::move(counts)),
        range_counts_(std::move(range_counts)),
        columns_(flat(columns)),
        ranges_(flat(ranges)),
        tile_k_(tile_k),
        q_tile_(q_tile) {
    auto width = [](Rows const& rows) {
      return rows.empty() ? 0 : static_cast<int32_t>(rows[0].size());
    };
    params_ = {
        len_q,
        len_kv,
        block_q,
        range_size,
        causal,
        {counts_.data(), columns_.data(), width(columns)},
        {range_counts_.empty() ? nullptr : range_counts_.data(), ranges_.data(), width(ranges)},
        0,
        0};
    sizes_ = run_sizes(params_, tile_k);
    find_streams(params_, 0, 0, q_tile, streams_);
  }

  std::tuple<int32_t, int32_t, int32_t> stages() const {
    StreamStages const s = stream_stages();
    return {s.both, s.first, s.second};
  }

  // The key of each row of a stage, 2^30 or more if there is none, and whether a consumer masks the
  // stage.
  std::pair<std::vector<int32_t>, bool> keys(int32_t stream, int32_t stage,
                                             int32_t consumer) const {
    StripeStream const& from = streams_[stream];
    int32_t const runs = run_stages(sizes_, from);
    StreamStages const stages = stream_stages();
    ListWalk const walk = list_walk(stages, whole(0), whole(1 + consumer), consumer);
    std::vector<int32_t> keys;
    for (int32_t row = 0; row < tile_k_; ++row) {
      int32_t const box = row >> sizes_.log2_box;
      keys.push_back(
          stage < runs
              ? run_origin(params_, sizes_, from, stage, box) + (row & ((1 << sizes_.log2_box) - 1))
              : column_key(params_, listed_column(from, (stage - runs) * tile_k_ + row)));
    }
    return {keys, walk.is_masked(stage + (stream == 0 ? 0 : stages.both))};
  }

  int32_t limit(int32_t query) const { return Stripe::limit(params_, query); }

 private:
  StreamStages stream_stages() const {
    auto stages = [&](int i) { return stages_of(sizes_, tile_k_, streams_[i]); };
    return {stages(0), stages(1), stages(2)};
  }
  // Same as Stripes::look_through().
  WholeStages whole(int32_t stream) const {
    StripeStream const& from = streams_[stream];
    int32_t const limit = Stripe::limit(params_, q_tile_ * 128 + (stream == 2 ? 64 : 0));
    int32_t runs = 0;
    while (runs < from.num_runs && is_whole_run(params_, from.runs[runs], limit)) {
      ++runs;
    }
    int32_t columns = 0;
    while (columns < from.num_columns && is_whole_column(from.columns[columns], limit)) {
      ++columns;
    }
    return whole_stages(sizes_, tile_k_, from, runs, columns);
  }

  static std::vector<int32_t> flat(Rows const& rows) {
    std::vector<int32_t> all;
    for (auto const& row : rows) {
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

  std::vector<int32_t> counts_, range_counts_, columns_, ranges_;
  Stripe::Params params_;
  BoxSizes sizes_;
  int32_t tile_k_;
  int32_t q_tile_;
  StripeStream streams_[3] = {};
};

}  // namespace

void bind_stripes(py::module_& m) {
  py::class_<QueryTileStripes>(m, "QueryTileStripes",
                               "The stages of one query tile of 128 rows, from int32 lists.")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, bool, int32_t, int32_t,
                    std::vector<int32_t>, QueryTileStripes::Rows const&, std::vector<int32_t>,
                    QueryTileStripes::Rows const&>(),
           py::arg("len_q"), py::arg("len_kv"), py::arg("block_q"), py::arg("range_size"),
           py::arg("causal"), py::arg("tile_k"), py::arg("q_tile"), py::arg("counts"),
           py::arg("columns"), py::arg("range_counts"), py::arg("ranges"))
      .def_property_readonly("stages", &QueryTileStripes::stages)
      .def("keys", &QueryTileStripes::keys, py::arg("stream"), py::arg("stage"),
           py::arg("consumer"))
      .def("limit", &QueryTileStripes::limit, py::arg("query"));
}
