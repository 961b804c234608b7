#include "sparse_fmha/planning/choose_row.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>
#include <variant>

#include "sparse_fmha/core/packed.h"
#include "sparse_fmha/planning/few_rows.h"

namespace sparse_fmha {
namespace {

std::atomic<int32_t> override_{0};

constexpr RowCost kRows[] = {
#define SPARSE_FMHA_ROW_COST(arch, mechanism, packed, head_dim, value_dim, tile_q, tile_k, blocks, \
                             tile_ns, step_ns, alone_ns)                                           \
  {Arch::arch,     mechanism_index<mechanism>(),                                                   \
   packed,         head_dim,                                                                       \
   value_dim,      tile_q,                                                                         \
   tile_k,         blocks,                                                                         \
   tile_ns * 1e-3, step_ns * 1e-3,                                                                 \
   alone_ns * 1e-3},
#include "row_costs.inc"  // from csrc/kernels/*.def, in the order of the lists
#undef SPARSE_FMHA_ROW_COST
};

bool may_choose(KernelKey const& request) {
  return request.pass == Pass::kForward && !request.skips && !request.key_bias;
}

bool serves(RowCost const& row, KernelKey const& request) {
  return row.arch == request.arch && row.mechanism == request.mechanism &&
         row.packed == request.packed && row.head_dim >= request.head_dim &&
         row.value_dim >= request.value_dim;
}

// Calls body(row) for each row that the request may take.
template <class Body>
void for_each_row(KernelKey const& request, Body const& body) {
  if (!may_choose(request)) {
    return;
  }
  using Dims = std::pair<int32_t, int32_t>;
  auto const dims = [](RowCost const& row) { return Dims{row.head_dim, row.value_dim}; };
  Dims smallest{INT32_MAX, INT32_MAX};
  for (RowCost const& row : kRows) {
    if (serves(row, request)) {
      smallest = std::min(smallest, dims(row));
    }
  }
  for (RowCost const& row : kRows) {
    if (serves(row, request) && dims(row) == smallest) {
      body(row);
    }
  }
}

}  // namespace

std::vector<RowCost> row_costs(KernelKey const& request) {
  std::vector<RowCost> rows;
  for_each_row(request, [&](RowCost const& row) { rows.push_back(row); });
  return rows;
}

RowTime predict(RowCost const& row, RowWork const& work, int32_t multiprocessors) {
  int64_t const q_tiles = (int64_t{work.len_q} + row.tile_q - 1) / row.tile_q;
  int64_t const tiles = q_tiles * work.instances;
  int64_t const slots = int64_t{multiprocessors} * row.blocks;
  double const step_us = tiles <= multiprocessors ? row.alone_us : row.step_us;
  // The time of a query tile, from the last one of a head down: kernels take heavy ones first.
  auto tile_us = [&](int64_t rank) {
    int64_t keys = work.len_kv;
    if (work.causal) {
      int64_t const after = std::min<int64_t>(work.len_q, (q_tiles - rank) * row.tile_q);
      keys = std::clamp<int64_t>(after + work.len_kv - work.len_q, 0, work.len_kv);
    }
    return row.tile_us + step_us * static_cast<double>((keys + row.tile_k - 1) / row.tile_k);
  };
  // Tiles grow by equal steps. The time is at least that of all tiles over what runs at once, and,
  // for any n, n + 1 times that of the lightest among the n * slots + 1 heaviest tiles.
  double us = static_cast<double>(tiles) / static_cast<double>(slots) *
              (tile_us(0) + tile_us(q_tiles - 1)) / 2;
  auto after_waves = [&](int64_t n) {
    us = std::max(us, static_cast<double>(n + 1) * tile_us(n * slots / work.instances));
  };
  int64_t const last = (tiles + slots - 1) / slots - 1;
  if (last >= 0) {
    after_waves(last);  // the largest one if all tiles are equal
  }
  constexpr int64_t kMostWaves = 4;  // in more, all tiles count
  for (int64_t n = 0; n < std::min(last, kMostWaves); ++n) {
    after_waves(n);
  }
  return {row.tile_q, static_cast<double>(tiles) / static_cast<double>(slots), us};
}

int32_t choose_tile_q(KernelKey const& request, FmhaProblem const& problem,
                      int32_t multiprocessors) {
  int32_t const wanted = override_.load(std::memory_order_relaxed);
  if (request.pass == Pass::kDecode) {
    bool const few = FewRows::serves(*problem.decode, problem.batch, problem.heads_kv) &&
                     (wanted == 0 || wanted == FewRows::kRows);
    return few ? FewRows::kRows : DecodeKeys::kRows;
  }
  int64_t const in_grid =  // sequences
      problem.packed != nullptr ? std::max<int64_t>(problem.packed->sequences, 1) : 1;
  auto const length = [&](auto const& grid) {
    return static_cast<int32_t>((volume(grid) + in_grid - 1) / in_grid);
  };
  RowWork const work = {problem.batch * in_grid * problem.heads_q, length(problem.grid_q),
                        length(problem.grid_kv),
                        std::holds_alternative<Causal::Params>(problem.sparsity)};
  RowTime best{0, 0, 0};
  bool is_override = false;
  for_each_row(request, [&](RowCost const& row) {
    is_override |= row.tile_q == wanted;
    if (row.tile_us > 0) {
      RowTime const time = predict(row, work, multiprocessors);
      if (best.tile_q == 0 || time.us < best.us) {
        best = time;
      }
    }
  });
  return is_override ? wanted : best.tile_q;
}

int32_t set_tile_q_override(int32_t tile_q) { return override_.exchange(tile_q); }

}  // namespace sparse_fmha
