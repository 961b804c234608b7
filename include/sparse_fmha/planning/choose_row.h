// Chooses among kernels of dense and causal attention that differ in their query tile: small tiles
// share little work out to all multiprocessors, large ones take less time for each row.
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_fmha/core/registry.h"

namespace sparse_fmha {

// Measured times of a row of csrc/kernels; zero where the row has no other beside it.
struct RowCost {
  Arch arch;
  int32_t mechanism;  // index in Sparsity
  bool packed;        // sequences share one dimension of tokens
  int32_t head_dim;   // the largest of the row
  int32_t value_dim;  // the same
  int32_t tile_q;
  int32_t tile_k;
  int32_t blocks;   // thread blocks on a multiprocessor
  double tile_us;   // a query tile, besides its steps
  double step_us;   // a key tile, where the multiprocessor is full
  double alone_us;  // a key tile, where the thread block is alone on the multiprocessor
};

// Dense or causal attention of `instances` heads of batch entries, or of packed sequences, which
// count as equally long.
struct RowWork {
  int64_t instances;
  int32_t len_q;
  int32_t len_kv;
  bool causal;
};

struct RowTime {
  int32_t tile_q;
  double waves;  // query tiles over those that run at once
  double us;     // predicted
};

// The rows that such a request may take, in the order of the list; all have the same head dims.
std::vector<RowCost> row_costs(KernelKey const& request);

RowTime predict(RowCost const& row, RowWork const& work, int32_t multiprocessors);

// The tile_q of the row that `request` takes, for find_kernel(): that of the override if there is
// such a row, else of the fastest by predict(). Zero where there is no choice.
int32_t choose_tile_q(KernelKey const& request, FmhaProblem const& problem,
                      int32_t multiprocessors);

// Makes all calls take rows with this query tile where there are some; 0 lets calls choose. Returns
// what was set before.
int32_t set_tile_q_override(int32_t tile_q);

}  // namespace sparse_fmha
