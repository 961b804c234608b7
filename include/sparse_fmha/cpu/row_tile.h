// Scores of query rows with tiles of keys, for the ops that choose keys. Queries lie across the
// lanes, as in attend.h.
#pragma once

#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/multiply.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

inline constexpr int kTileKeys = 64;

// Query rows and a tile of keys, in a thread's scratch memory.
template <class Element>
struct RowTile {
  using T = typename ComputeOf<Element>::type;
  static constexpr int kLanes = kPanel<T>;

  int rows;  // in whole panels
  int dim;
  T* queries;  // [panel][dim][lane]
  T* keys;     // [kTileKeys][dim]
  T* scores;   // [kTileKeys][lane], of one panel
  T* figures;  // one per row, for the caller's use

  RowTile(int num_rows, int head_dim, void* scratch)
      : rows(round_up(num_rows, kLanes)), dim(head_dim), queries(static_cast<T*>(scratch)) {
    keys = queries + rows * dim;
    scores = keys + kTileKeys * dim;
    figures = scores + kTileKeys * kLanes;
  }
  static size_t bytes(int num_rows, int head_dim) {
    RowTile const plan(num_rows, head_dim, nullptr);
    return sizeof(T) * (plan.rows * (head_dim + 1) + kTileKeys * (head_dim + kLanes));
  }

  template <class From>
  void load_query(int row, From const* from, T factor) {
    T* const to = queries + row / kLanes * kLanes * dim + row % kLanes;
    for (int d = 0; d < dim; ++d) {
      to[d * kLanes] = widen(from[d]) * factor;
    }
  }
  // Zeroes lanes without a query, which are computed as well.
  void clear_queries_from(int first) {
    for (int row = first; row < rows; ++row) {
      T* const to = queries + row / kLanes * kLanes * dim + row % kLanes;
      for (int d = 0; d < dim; ++d) {
        to[d * kLanes] = 0;
      }
    }
  }
  // A nullptr is a row of zeros.
  void load_key(int key, Element const* from) {
    if (from != nullptr) {
      widen_row(from, dim, keys + key * dim);
    } else {
      std::memset(keys + key * dim, 0, sizeof(T) * dim);
    }
  }
  // Fills `scores` for the rows of the panel that begins at `first`.
  void multiply_panel(int first) {
    multiply<false>(Factor<T>{keys, dim, 1}, kTileKeys, queries + first * dim, kPanelVectors, dim,
                    scores, kLanes);
  }
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
