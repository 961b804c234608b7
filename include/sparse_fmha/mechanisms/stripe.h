// Every group of query rows sees the keys in its lists: single columns, and runs of keys.
//
// A mechanism by lists (contract.h). A position's first axis selects what its last one counts: 0:
// keys; 1: entries of the column list of the group on the second axis. There is no walk_transposed.
#pragma once

#include "sparse_fmha/mechanisms/block_sparse.h"

namespace sparse_fmha {

struct Stripe {
  static constexpr char const* kName = "stripe";
  static constexpr bool kOnGrid = false;
  static constexpr bool kByLists = true;

  struct Params {
    int32_t len_q;
    int32_t len_kv;
    int32_t block_q;     // rows of a group
    int32_t range_size;  // keys of a run
    bool causal;         // key j must also be <= i + len_kv - len_q
    BlockSparse::Lists columns;
    BlockSparse::Lists ranges;  // first keys of runs; counts is nullptr if there are none
    // Stride of a batch entry's or head's lists, in groups; 0 if they are shared.
    int64_t batch_stride;
    int64_t head_stride;
  };

  // Keys [0, limit) exist and are not after the query.
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t q) {
    return p.causal ? min_int(q + 1 + p.len_kv - p.len_q, p.len_kv) : p.len_kv;
  }
  static SPARSE_FMHA_HD Params for_head(Params p, int32_t batch, int32_t head) {
    int64_t const row = batch * p.batch_stride + head * p.head_stride;
    p.columns = BlockSparse::from_row(p.columns, row);
    if (p.ranges.counts != nullptr) {
      p.ranges = BlockSparse::from_row(p.ranges, row);
    }
    return p;
  }

  struct Row {
    int32_t limit;
  };
  static SPARSE_FMHA_HD Row row(Params const& p, Coord const& /*residue*/, Coord const& q) {
    return {limit(p, q[2])};
  }
  // `k` is a token here, converted by key_position().
  static SPARSE_FMHA_HD bool visible(Params const& /*p*/, Row const& r, Coord const& k) {
    return k[2] < r.limit;
  }
  static SPARSE_FMHA_HD Coord key_position(Coord const& /*position*/, Coord const& token) {
    return token;
  }
  static SPARSE_FMHA_HD Coord token(Params const& p, Coord const& /*residue*/, Coord const& pos) {
    if (pos[0] == 0) {
      return {0, 0, pos[2]};
    }
    bool const listed = pos[2] < BlockSparse::count(p.columns, pos[1]);
    int32_t const key = listed ? p.columns.indices[pos[1] * int64_t{p.columns.width} + pos[2]] : -1;
    return {0, 0, key < 0 ? p.len_kv : key};  // past the last token
  }

  static SPARSE_FMHA_HD int32_t num_query_tiles(Params const& p, TileShape const& t) {
    return ceil_div(p.len_q, t.q[2]);
  }
  static SPARSE_FMHA_HD QueryTile query_tile(Params const& /*p*/, TileShape const& t, int32_t i) {
    return {{0, 0, 0}, {0, 0, i * t.q[2]}};
  }

  // The runs, each in `parts` tiles, then the columns, in tiles of as many as a tile has keys.
  struct Walk {
    Params params;
    int32_t first_query;
    int32_t tile_k;
    int32_t num_ranges;  // tiles of runs
    int32_t num_partial;
    int32_t num_full;

    SPARSE_FMHA_HD int32_t group() const { return first_query / params.block_q; }
    SPARSE_FMHA_HD Coord tile(int32_t i) const {
      if (i >= num_ranges) {
        return {1, group(), (i - num_ranges) * tile_k};
      }
      int32_t const parts = params.range_size / tile_k;
      int32_t const start =
          params.ranges.indices[int64_t{group()} * params.ranges.width + i / parts];
      bool const there = start >= 0 && start < params.len_kv;
      return {0, 0, there ? start + i % parts * tile_k : params.len_kv};
    }
    // Whether the diagonal cuts a tile. Columns ascend.
    SPARSE_FMHA_HD bool is_cut(Coord const& tile) const {
      if (!params.causal) {
        return false;
      }
      int32_t last = tile[2] + tile_k - 1;
      if (tile[0] == 1) {
        last = min_int(last, BlockSparse::count(params.columns, tile[1]) - 1);
        last = params.columns.indices[int64_t{tile[1]} * params.columns.width + last];
        if (last < 0) {
          return true;  // no such key; the ones before it are unknown
        }
      }
      return min_int(last, params.len_kv - 1) >= limit(params, first_query);
    }
  };
  static SPARSE_FMHA_HD Walk walk(Params const& p, TileShape const& t, QueryTile const& q) {
    int64_t const group = q.origin[2] / p.block_q;
    int32_t const ranges = BlockSparse::count(p.ranges, group) * (p.range_size / t.k[2]);
    int32_t const columns = ceil_div(BlockSparse::count(p.columns, group), t.k[2]);
    return {p, q.origin[2], t.k[2], ranges, 0, ranges + columns};
  }
};

}  // namespace sparse_fmha
