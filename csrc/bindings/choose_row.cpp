// Which row a dense or causal call takes where several differ in their query tile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "sparse_fmha/planning/choose_row.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;

// (tile_q, waves, predicted microseconds) of each row.
std::vector<std::tuple<int32_t, double, double>> row_times(bool causal, int32_t head_dim,
                                                           int64_t instances, int32_t len_q,
                                                           int32_t len_kv,
                                                           int32_t multiprocessors) {
  KernelKey const request = {Arch::kSm90,
                             Pass::kForward,
                             DataType::kBFloat16,  // costs are those of fp16, too
                             head_dim,
                             head_dim,
                             causal ? mechanism_index<Causal>() : mechanism_index<Dense>(),
                             false};
  std::vector<std::tuple<int32_t, double, double>> times;
  for (RowCost const& row : row_costs(request)) {
    RowTime const time = predict(row, {instances, len_q, len_kv, causal}, multiprocessors);
    times.emplace_back(time.tile_q, time.waves, time.us);
  }
  return times;
}

}  // namespace

void bind_choose_row(py::module_& m) {
  m.def("row_times", &row_times, py::arg("causal"), py::arg("head_dim"), py::arg("instances"),
        py::arg("len_q"), py::arg("len_kv"), py::arg("multiprocessors") = 132,
        "(tile_q, waves, predicted us) of each sm90 row that such a dense or causal call may take, "
        "in the order of the list; instances are heads of batch entries.");
  m.def("set_tile_q_override", &set_tile_q_override, py::arg("tile_q"),
        "Makes calls on GPUs take the row with this query tile where there is one; 0: the fastest "
        "by row_times(). Returns what was set before.");
}
