// Weights of SSA's choice, compiled once per instruction set (for the requirements see
// attend_isa.cpp).
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/row_tile.h"
#include "sparse_fmha/cpu/softmax.h"
#include "sparse_fmha/cpu/ssa_isa.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

constexpr double kLog2e = 1.44269504088896340736;

// The memory of an item: the tile, the scores of all rows, [panel][column][lane], and three numbers
// for each lane of a panel.
template <class Element>
struct Memory {
  using Tile = RowTile<Element>;
  using T = typename Tile::T;
  static constexpr int kLanes = Tile::kLanes;

  static int columns(SsaChoices const& p) { return round_up(p.columns, kTileKeys); }
  static int rows(SsaChoices const& p) { return max_int(kSsaRows, p.group()); }
  static size_t tile_bytes(SsaChoices const& p) {
    return (Tile::bytes(rows(p), p.head_dim) + 63) / 64 * 64;
  }
  static size_t bytes(SsaChoices const& p) {
    int64_t const lanes = round_up(rows(p), kLanes);
    return tile_bytes(p) + sizeof(T) * (lanes * columns(p) + 3 * kLanes);
  }
};

template <class Element>
size_t scratch(SsaChoices const& p) {
  return Memory<Element>::bytes(p);
}

// Adds up the parts of a mean.
template <class Element>
void load_mean(RowTile<Element>& tile, SsaChoices const& p, SsaTokens const& item, int key,
               int32_t column) {
  using T = typename RowTile<Element>::T;
  tile.load_key(
      key, column < p.columns ? p.mean<Element>(0, item.entry, column, item.head_kv) : nullptr);
  T* const to = tile.keys + key * p.head_dim;
  for (int32_t part = 1; part < p.parts && column < p.columns; ++part) {
    auto const* const from = p.mean<Element>(part, item.entry, column, item.head_kv);
    for (int d = 0; d < p.head_dim; ++d) {
      to[d] += widen(from[d]);
    }
  }
}

template <class Element>
void weights(SsaChoices const& p, SsaTokens const& item, double* to, void* scratch) {
  using Place = Memory<Element>;
  using T = typename Place::T;
  constexpr int kLanes = Place::kLanes;
  int32_t const group = p.group();
  RowTile<Element> tile(item.count * group, p.head_dim, scratch);
  int64_t const panel = int64_t{Place::columns(p)} * kLanes;
  auto* const all = reinterpret_cast<T*>(static_cast<char*>(scratch) + Place::tile_bytes(p));
  T* const figures = all + tile.rows / kLanes * panel;
  // As in attend.h; hidden scores are not multiplied by a scale of 0.
  T const factor = p.scale < 0 ? T(-1) : p.scale > 0 ? T(1) : T(0);
  T const scale_log2 = static_cast<T>((p.scale == 0 ? 1 : __builtin_fabs(p.scale)) * kLog2e);
  for (int row = 0; row < item.count * group; ++row) {
    tile.load_query(
        row,
        p.query<Element>(item.entry, item.first + row / group, item.head_kv * group + row % group),
        factor);
  }
  tile.clear_queries_from(item.count * group);
  int32_t const last = item.first + item.count - 1;
  int32_t const complete = p.complete(last);
  for (int32_t first = 0; first < complete; first += kTileKeys) {
    for (int key = 0; key < kTileKeys; ++key) {
      load_mean(tile, p, item, key, first + key);
    }
    for (int row = 0; row < tile.rows; row += kLanes) {
      tile.scores = all + row / kLanes * panel + int64_t{first} * kLanes;
      tile.multiply_panel(row);
    }
  }
  std::memset(to, 0, sizeof(double) * item.count * p.columns);
  T* const most = figures;
  T* const sum = most + kLanes;
  T* const rescale = sum + kLanes;
  for (int row = 0; row < tile.rows; row += kLanes) {
    T* const scores = all + row / kLanes * panel;
    for (int lane = 0; lane < kLanes; ++lane) {
      most[lane] = -kInfinity<T>;
      sum[lane] = 0;
      int32_t const own_end =
          row + lane < item.count * group ? p.complete(item.first + (row + lane) / group) : 0;
      for (int32_t key = own_end; key < complete; ++key) {
        scores[int64_t{key} * kLanes + lane] = -kInfinity<T>;
      }
    }
    // All at once, so `scores` are then shares but for their sum.
    update_softmax<T, kPanelVectors>(scores, complete, scale_log2, most, sum, rescale);
    for (int lane = 0; lane < kLanes && row + lane < item.count * group; ++lane) {
      // As inf - inf in the definition.
      double const total = most[lane] < kLargest<T> ? double(sum[lane]) : __builtin_nan("");
      double* const of_token = to + (row + lane) / group * int64_t{p.columns};
      for (int32_t key = 0; key < complete; ++key) {
        of_token[key] += double(scores[int64_t{key} * kLanes + lane]) / total;
      }
    }
  }
}

template <class Element>
SsaIsa of_element() {
  return {scratch<Element>, weights<Element>};
}

}  // namespace

SsaIsa ssa(DataType dtype) {
  return with_element(dtype, [&](auto element) { return of_element<decltype(element)>(); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
