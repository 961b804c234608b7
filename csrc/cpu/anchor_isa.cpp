// Scores of AnchorAttention's choice of keys, compiled once per instruction set (for the
// requirements see attend_isa.cpp). Queries lie across the lanes, as in attend.h.
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/row_tile.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

constexpr int kKeys = AnchorGrid::kTile;
static_assert(kKeys == kTileKeys, "a tile of keys is one of the grid's");

// NaN if either is NaN: a row with NaN scores has no anchor.
template <class T>
inline T larger(T x, T y) {
  return x > y || x != x ? x : y;
}

inline int64_t offset(TensorView const& t, int64_t batch, int64_t token, int64_t head) {
  return batch * t.batch_stride + token * t.axis_stride[kGridAxes - 1] + head * t.head_stride;
}

// Loads keys [first, first + kKeys); 0 past the last.
template <class Element>
inline void load_keys(RowTile<Element>& tile, TensorView const& k, int64_t batch, int32_t first,
                      int32_t length, int64_t head) {
  auto const* const data = static_cast<Element const*>(k.data);
  for (int key = 0; key < kKeys; ++key) {
    tile.load_key(key, first + key < length ? data + offset(k, batch, first + key, head) : nullptr);
  }
}

template <class Element>
size_t means_scratch(AnchorMeans const& p) {
  return RowTile<Element>::bytes(p.grid.block, p.head_dim);
}

template <class Element>
void means(AnchorMeans const& p, int64_t item, void* scratch) {
  using T = typename RowTile<Element>::T;
  constexpr int kLanes = RowTile<Element>::kLanes;
  auto const block = static_cast<int32_t>(item % p.grid.blocks());
  int64_t const head = item / p.grid.blocks() % p.heads_q;
  int64_t const batch = item / p.grid.blocks() / p.heads_q;
  int32_t const first = block * p.grid.block;
  int32_t const rows = min_int(p.grid.block, p.grid.length - first);
  RowTile<Element> tile(p.grid.block, p.head_dim, scratch);
  auto const* const q = static_cast<Element const*>(p.q.data);
  for (int row = 0; row < rows; ++row) {
    tile.load_query(row, q + offset(p.q, batch, first + row, head), p.scale < 0 ? T(-1) : T(1));
  }
  tile.clear_queries_from(rows);
  T* const tops = tile.figures;
  for (int row = 0; row < tile.rows; ++row) {
    tops[row] = -__builtin_inf();
  }
  for (int32_t t = 0; t < p.grid.anchor_tiles(block); ++t) {
    int32_t const key = p.grid.anchor_tile(block, t);
    load_keys(tile, p.k, batch, key, p.grid.length, head / (p.heads_q / p.heads_kv));
    for (int row = 0; row < rows; row += kLanes) {
      tile.multiply_panel(row);
      for (int i = 0; i < kKeys; ++i) {
        // Queries before the key do not see it.
        for (int lane = max_int(0, key + i - first - row); lane < kLanes; ++lane) {
          tops[row + lane] = larger(tops[row + lane], tile.scores[i * kLanes + lane]);
        }
      }
    }
  }
  double sum = 0;
  for (int row = 0; row < rows; ++row) {
    sum += tops[row];
  }
  p.means[item] = static_cast<float>(sum * __builtin_fabs(p.scale) / rows);
}

template <class Element>
size_t keys_scratch(AnchorKeys const& p) {
  return RowTile<Element>::bytes(p.grid.step, p.head_dim);
}

template <class Element>
void keys(AnchorKeys const& p, int64_t item, void* scratch) {
  using T = typename RowTile<Element>::T;
  constexpr int kLanes = RowTile<Element>::kLanes;
  auto const superblock = static_cast<int32_t>(item % p.grid.superblocks());
  int64_t const heads = item / p.grid.superblocks();
  int64_t const head = heads % p.heads_q;
  int64_t const batch = heads / p.heads_q;
  int32_t const first = superblock * p.grid.step;
  int32_t const rows = min_int(p.grid.step, p.grid.blocks() - first);
  RowTile<Element> tile(p.grid.step, p.head_dim, scratch);
  auto const* const q = static_cast<float const*>(p.q_mean.data);
  T* const least = tile.figures;
  for (int row = 0; row < rows; ++row) {
    tile.load_query(row, q + offset(p.q_mean, batch, first + row, head), T(1));
    least[row] = p.least[heads * p.grid.blocks() + first + row];
  }
  tile.clear_queries_from(rows);
  for (int row = rows; row < tile.rows; ++row) {
    least[row] = __builtin_nan("");  // no score reaches it
  }
  int32_t const candidates = p.grid.candidates(superblock);
  uint32_t* const bits = p.bits + item * p.grid.words();
  std::memset(bits, 0, sizeof(uint32_t) * p.grid.words());
  int32_t count = 0;
  for (int32_t start = 0; start < candidates; start += kKeys) {
    load_keys(tile, p.k, batch, p.grid.block + start, p.grid.length,
              head / (p.heads_q / p.heads_kv));
    bool kept[kKeys] = {};
    for (int row = 0; row < rows; row += kLanes) {
      tile.multiply_panel(row);
      for (int i = 0; i < kKeys; ++i) {
        bool any = false;
        for (int lane = 0; lane < kLanes; ++lane) {
          any |= tile.scores[i * kLanes + lane] >= least[row + lane];
        }
        kept[i] |= any;
      }
    }
    for (int i = 0; i < kKeys; ++i) {
      bits[(start + i) / 32] |= uint32_t{kept[i]} << i % 32;
      count += kept[i];
    }
  }
  p.counts[item] = count;
}

template <class Element>
AnchorIsa of_element() {
  return {means_scratch<Element>, keys_scratch<Element>, means<Element>, keys<Element>};
}

}  // namespace

AnchorIsa anchor(DataType dtype) {
  return with_element(dtype, [&](auto element) { return of_element<decltype(element)>(); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
