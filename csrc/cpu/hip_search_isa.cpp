// Scores of HiP's search, compiled once per instruction set (for the requirements see
// attend_isa.cpp).
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/hip_isa.h"
#include "sparse_fmha/cpu/row_tile.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Element>
size_t scratch(HipSearch const& p) {
  return RowTile<Element>::bytes(p.rows(0), p.head_dim);
}

template <class Element>
void scores(HipSearch const& p, HipItem const& item, int32_t const* positions, int32_t count,
            double* to, void* scratch) {
  using T = typename RowTile<Element>::T;
  constexpr int kLanes = RowTile<Element>::kLanes;
  int32_t const rows = p.rows(item.group);
  RowTile<Element> tile(rows, p.head_dim, scratch);
  for (int row = 0; row < tile.rows; ++row) {
    // The last row takes the place of those that are missing.
    tile.load_query(row, item.query<Element>(p, min_int(row, rows - 1)), T(1));
  }
  for (int32_t first = 0; first < count; first += kTileKeys) {
    int32_t const keys = min_int(kTileKeys, count - first);
    bool exists[kTileKeys] = {};
    T tops[kTileKeys];
    for (int i = 0; i < kTileKeys; ++i) {
      Element const* const key = i < keys ? item.key<Element>(p, positions[first + i]) : nullptr;
      tile.load_key(i, key);
      exists[i] = key != nullptr;
      tops[i] = -__builtin_inf();
    }
    for (int row = 0; row < tile.rows; row += kLanes) {
      tile.multiply_panel(row);
      for (int i = 0; i < keys; ++i) {
        for (int lane = 0; lane < kLanes; ++lane) {
          T const score = tile.scores[i * kLanes + lane];
          tops[i] = score > tops[i] || score != score ? score : tops[i];  // NaN stays
        }
      }
    }
    for (int i = 0; i < keys; ++i) {
      to[first + i] = exists[i] ? double(tops[i]) : -__builtin_inf();
    }
  }
}

template <class Element>
HipIsa of_element() {
  return {scratch<Element>, scores<Element>};
}

}  // namespace

HipIsa hip(DataType dtype) {
  return with_element(dtype, [&](auto element) { return of_element<decltype(element)>(); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
