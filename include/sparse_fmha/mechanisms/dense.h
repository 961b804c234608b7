// Every query sees every key (Dense), or every key up to its own position (Causal).
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha {

// Equal tiles along one axis, in descending order. The ragged or diagonal tiles are the highest, so
// the walk visits the partial tiles first and the full ones last.
struct DescendingWalk {
  int32_t num_partial;
  int32_t num_full;
  int32_t last;  // origin of the first tile visited
  int32_t step;  // tokens from one tile to the next lower one
  SPARSE_FMHA_HD Coord tile(int32_t i) const { return {0, 0, last - i * step}; }
};

// A mechanism on one axis in which each query sees a prefix of the keys that never shrinks from one
// query to the next. Limits has the functions from which everything else follows:
//   limit(Params, q)        keys [0, limit) are visible to query q
//   first_query(Params, k)  queries [first_query, len_q) see key k
//   kStep                   first_query grows by this per key, where it is above 0
template <class Limits>
struct PrefixParams {
  int32_t len_q;
  int32_t len_kv;
};
template <class Limits, class Params_ = PrefixParams<Limits>>
struct Prefix {
  using Params = Params_;
  struct Row {
    int32_t limit;  // keys [0, limit) are visible
    // The same row when key positions are counted from `origin`.
    SPARSE_FMHA_HD Row relative_to(Coord const& origin) const { return {limit - origin[2]}; }
  };

  static SPARSE_FMHA_HD Row row(Params const& p, Coord const& /*residue*/, Coord const& q) {
    return {Limits::limit(p, q[2])};
  }
  static SPARSE_FMHA_HD bool visible(Params const& /*p*/, Row const& r, Coord const& k) {
    return k[2] < r.limit;
  }
  static SPARSE_FMHA_HD Coord token(Params const& /*p*/, Coord const& /*residue*/,
                                    Coord const& pos) {
    return pos;
  }

  static SPARSE_FMHA_HD int32_t num_query_tiles(Params const& p, TileShape const& t) {
    return ceil_div(p.len_q, t.q[2]);
  }
  static SPARSE_FMHA_HD QueryTile query_tile(Params const& /*p*/, TileShape const& t, int32_t i) {
    return {{0, 0, 0}, {0, 0, i * t.q[2]}};
  }
  static SPARSE_FMHA_HD int32_t num_key_tiles(Params const& p, TileShape const& t) {
    return ceil_div(p.len_kv, t.k[2]);
  }
  static SPARSE_FMHA_HD KeyTile key_tile(Params const& /*p*/, TileShape const& t, int32_t i) {
    return {{0, 0, 0}, {0, 0, i * t.k[2]}};
  }

  static constexpr bool kOnGrid = false;
  static constexpr bool kByLists = false;
  // Rows [a, b) of a query tile visit only the last tiles of the whole tile's walk.
  static constexpr bool kPartsAreSuffixes = true;

  static SPARSE_FMHA_HD DescendingWalk walk(Params const& p, TileShape const& t,
                                            QueryTile const& q) {
    if (q.origin[2] >= p.len_q) {
      return {0, 0, 0, t.k[2]};
    }
    int32_t const last_query = min_int(q.origin[2] + t.q[2], p.len_q) - 1;
    int32_t const visited = ceil_div(Limits::limit(p, last_query), t.k[2]);
    int32_t const full = Limits::limit(p, q.origin[2]) / t.k[2];
    return {visited - full, full, (visited - 1) * t.k[2], t.k[2]};
  }

  // Partial tiles come first here too. They are the lowest, so the walk ascends.
  static SPARSE_FMHA_HD DescendingWalk walk_transposed(Params const& p, TileShape const& t,
                                                       KeyTile const& k) {
    int32_t const end = ceil_div(p.len_q, t.q[2]);
    int32_t const last_key = k.origin[2] + t.k[2] - 1;
    int32_t const begin = min_int(Limits::first_query(p, k.origin[2]) / t.q[2], end);
    int32_t const all = last_key < p.len_kv ? Limits::first_query(p, last_key) : p.len_q;
    int32_t const first_full = min_int(ceil_div(all, t.q[2]), end);
    return {first_full - begin, end - first_full, begin * t.q[2], -t.q[2]};
  }
};

struct Dense : Prefix<Dense> {
  static constexpr char const* kName = "dense";
  static constexpr int32_t kStep = 0;
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t /*q*/) { return p.len_kv; }
  static SPARSE_FMHA_HD int32_t first_query(Params const& /*p*/, int32_t /*k*/) { return 0; }
};

// Key j is visible to query i iff j <= i + (len_kv - len_q): the last query sees the last key.
struct Causal : Prefix<Causal> {
  static constexpr char const* kName = "causal";
  static constexpr int32_t kStep = 1;
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t q) {
    return min_int(max_int(q + 1 + p.len_kv - p.len_q, 0), p.len_kv);
  }
  static SPARSE_FMHA_HD int32_t first_query(Params const& p, int32_t k) {
    return max_int(k - (p.len_kv - p.len_q), 0);
  }
};

// Either of these, by a number, for kernels that serve both: query q sees keys [0, q + 1 + shift).
struct ShiftedParams {
  int32_t len_q;
  int32_t len_kv;
  int32_t shift;
};
struct DenseOrCausal : Prefix<DenseOrCausal, ShiftedParams> {
  static constexpr char const* kName = "dense_or_causal";
  static constexpr int32_t kStep = 1;
  static SPARSE_FMHA_HD Params of(Dense::Params const& p) { return {p.len_q, p.len_kv, p.len_kv}; }
  static SPARSE_FMHA_HD Params of(Causal::Params const& p) {
    return {p.len_q, p.len_kv, p.len_kv - p.len_q};
  }
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t q) {
    return min_int(max_int(q + 1 + p.shift, 0), p.len_kv);
  }
  static SPARSE_FMHA_HD int32_t first_query(Params const& p, int32_t k) {
    return max_int(k - p.shift, 0);
  }
};

}  // namespace sparse_fmha
