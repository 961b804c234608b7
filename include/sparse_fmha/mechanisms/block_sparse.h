// Every query block sees the key blocks of its lists: full ones entirely, partial ones by a
// bitmask.
//
// A mechanism by lists: the walk reads device or host memory. A sequence does not use a position's
// first axis, so it encodes the partial entry of a key: 0 for full blocks, else one more than the
// entry's index in the list. There is no walk_transposed: lists are transposed when they are made.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha {

struct BlockSparse {
  static constexpr char const* kName = "block_sparse";
  static constexpr bool kOnGrid = false;
  static constexpr bool kByLists = true;

  // Lists of key blocks, one for each (batch entry or all, query head or all, query block).
  struct Lists {
    int32_t const* counts;   // [rows]; clamped to [0, width]
    int32_t const* indices;  // [rows, width]; blocks that do not exist are ignored
    int32_t width;
  };

  struct Params {
    int32_t len_q;
    int32_t len_kv;
    int32_t block_q;   // 64 or 128
    int32_t block_kv;  // 16, 32, 64 or 128
    bool causal;       // key j must also be <= i + len_kv - len_q
    Lists full;
    Lists partial;        // counts is nullptr if there are no partial blocks
    uint8_t const* bits;  // [rows, partial.width, block_q, block_kv / 8], the lowest bit first
    // Stride of a batch entry's or head's lists, in rows; 0 if they are shared.
    int64_t batch_stride;
    int64_t head_stride;
  };

  static SPARSE_FMHA_HD int32_t count(Lists const& lists, int64_t row) {
    return lists.counts == nullptr ? 0 : min_int(max_int(lists.counts[row], 0), lists.width);
  }
  static SPARSE_FMHA_HD int32_t bits_bytes(Params const& p) { return p.block_q * p.block_kv / 8; }
  // Keys [0, limit) exist and are not after the query.
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t q) {
    return p.causal ? min_int(q + 1 + p.len_kv - p.len_q, p.len_kv) : p.len_kv;
  }

  static SPARSE_FMHA_HD Params for_head(Params p, int32_t batch, int32_t head) {
    int64_t const row = batch * p.batch_stride + head * p.head_stride;
    p.full = from_row(p.full, row);
    if (p.partial.counts != nullptr) {
      p.partial = from_row(p.partial, row);
      p.bits += row * p.partial.width * bits_bytes(p);
    }
    return p;
  }

  struct Row {
    int32_t limit;
    int32_t q;
  };
  static SPARSE_FMHA_HD Row row(Params const& p, Coord const& /*residue*/, Coord const& q) {
    return {limit(p, q[2]), q[2]};
  }
  static SPARSE_FMHA_HD bool visible(Params const& p, Row const& r, Coord const& k) {
    if (k[0] == 0) {
      return k[2] < r.limit;
    }
    int64_t const entry = int64_t{r.q / p.block_q} * p.partial.width + k[0] - 1;
    int32_t const column = k[2] % p.block_kv;
    int64_t const byte = (entry * p.block_q + r.q % p.block_q) * (p.block_kv / 8) + column / 8;
    return k[2] < r.limit && (p.bits[byte] >> column % 8 & 1) != 0;
  }
  static SPARSE_FMHA_HD Coord key_position(Coord const& position, Coord const& /*token*/) {
    return position;
  }
  static SPARSE_FMHA_HD Coord token(Params const& /*p*/, Coord const& /*residue*/,
                                    Coord const& pos) {
    return {0, 0, pos[2]};
  }

  static SPARSE_FMHA_HD int32_t num_query_tiles(Params const& p, TileShape const& /*t*/) {
    return ceil_div(p.len_q, p.block_q);
  }
  static SPARSE_FMHA_HD QueryTile query_tile(Params const& p, TileShape const& /*t*/, int32_t i) {
    return {{0, 0, 0}, {0, 0, i * p.block_q}};
  }

  // The blocks of the partial list, then those of the full list, each in `parts` tiles.
  struct Walk {
    Params params;
    int32_t first_query;
    int32_t parts;
    int32_t num_partial;
    int32_t num_full;

    SPARSE_FMHA_HD Coord tile(int32_t i) const {
      int64_t const row = first_query / params.block_q;
      bool const partial = i < num_partial;
      Lists const& lists = partial ? params.partial : params.full;
      int32_t const entry = (partial ? i : i - num_partial) / parts;
      int32_t const block = lists.indices[row * lists.width + entry];
      if (block < 0 || block >= ceil_div(params.len_kv, params.block_kv)) {
        return {0, 0, params.len_kv};  // past the last token
      }
      int32_t const first = block * params.block_kv + i % parts * (params.block_kv / parts);
      return {partial ? entry + 1 : 0, 0, first};
    }
    // Whether the diagonal cuts this part of a full block.
    SPARSE_FMHA_HD bool is_cut(Coord const& tile) const {
      int32_t const last = min_int(tile[2] + params.block_kv / parts, params.len_kv) - 1;
      return last >= limit(params, first_query);
    }
  };
  static SPARSE_FMHA_HD Walk walk(Params const& p, TileShape const& t, QueryTile const& q) {
    int64_t const row = q.origin[2] / p.block_q;
    int32_t const parts = p.block_kv / t.k[2];
    return {p, q.origin[2], parts, count(p.partial, row) * parts, count(p.full, row) * parts};
  }

  static SPARSE_FMHA_HD Lists from_row(Lists const& lists, int64_t row) {
    return {lists.counts + row, lists.indices + row * lists.width, lists.width};
  }
};

}  // namespace sparse_fmha
