// How stripes become block lists over copies of keys, for Python, so that tests can check it
// without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "sparse_fmha/planning/gathered_keys.h"

namespace py = pybind11;

namespace {

using namespace sparse_fmha;

using Parts = std::vector<std::tuple<int32_t, int32_t, int32_t, int32_t>>;

Parts parts(int32_t batch, int32_t heads_q, int32_t heads_kv, int32_t head_dim, int64_t copies,
            bool shared_heads) {
  Stripe::Params stripe = {};
  stripe.len_q = 64;
  stripe.block_q = 64;
  stripe.len_kv = static_cast<int32_t>(copies);
  stripe.columns.width = stripe.len_kv;
  stripe.head_stride = shared_heads ? 0 : 1;
  FmhaProblem problem;
  problem.batch = batch;
  problem.heads_q = heads_q;
  problem.heads_kv = heads_kv;
  problem.head_dim = problem.value_dim = head_dim;
  problem.sparsity = stripe;
  GatheredParts const found(problem);
  Parts all;
  for (int32_t i = 0; i < found.count(); ++i) {
    GatheredPart const part = found[i];
    all.emplace_back(part.first_batch, part.batch, part.first_head, part.heads);
  }
  return all;
}

using Blocks = std::pair<std::vector<int32_t>, std::vector<int32_t>>;

// As list_blocks() of device/gathered_lists.cu.
Blocks blocks(int32_t len_q, int32_t len_kv, bool causal, int32_t rows, int32_t first_row,
              std::vector<int32_t> const& tokens) {
  Stripe::Params stripe = {};
  stripe.len_q = len_q;
  stripe.len_kv = len_kv;
  stripe.causal = causal;
  Blocks found;
  auto const all = static_cast<int32_t>(tokens.size());
  for (int32_t first = 0; first < all; first += kGatheredBlock) {
    int32_t const count = std::min(all - first, kGatheredBlock);
    GatheredUse const use =
        gathered_use(stripe, first_row, rows, tokens[first], tokens[first + count - 1], count);
    if (use != GatheredUse::kNone) {
      (use == GatheredUse::kFull ? found.first : found.second).push_back(first / kGatheredBlock);
    }
  }
  return found;
}

}  // namespace

void bind_gathered_keys(py::module_& m) {
  m.def("gathered_parts", &parts, py::arg("batch"), py::arg("heads_q"), py::arg("heads_kv"),
        py::arg("head_dim"), py::arg("copies"), py::arg("shared_heads"),
        "(first batch entry, batch entries, first key head, key heads) of each part, of calls with "
        "so many copies of keys for a list.");
  m.def("gathered_blocks", &blocks, py::arg("len_q"), py::arg("len_kv"), py::arg("causal"),
        py::arg("rows"), py::arg("first_row"), py::arg("tokens"),
        "Which blocks of the copies of `tokens`, in ascending order, a block of query rows sees in "
        "full, and which by a bitmask.");
}
