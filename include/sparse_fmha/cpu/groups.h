// Groups of 64 query rows that skip key tiles together, and the key tiles that each visits.
//
// Groups and tiles match those of the Hopper kernel, so that both skip the same tiles: a group is
// the rows of one consumer warpgroup, a tile is a stage of keys, and the order is the consumer's.
// shape.q is the kernel's query tile on a grid, else 64 rows. shape.k is a box of keys; for kernels
// by lists, shape.k[1] is the number of boxes per stage.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::cpu {

inline constexpr int kGroupRows = 64;

// load(origin, extent) loads the keys of a box; visit(masked) processes the loaded keys.
template <class M>
class Group {
 public:
  static SPARSE_FMHA_HD int32_t count(typename M::Params const& p, TileShape const& shape) {
    return M::num_query_tiles(p, shape);
  }
  static SPARSE_FMHA_HD int64_t scratch_words(FmhaProblem const& /*problem*/) { return 0; }

  SPARSE_FMHA_HD Group(typename M::Params const& p, TileShape const& shape, int32_t index,
                       uint32_t* /*scratch*/)
      : rows(M::query_tile(p, shape, index)), extent(shape.q), params_(p), shape_(shape) {}

  template <class Load, class Visit>
  SPARSE_FMHA_HD void for_each_tile(Load load, Visit visit) const {
    auto const walk = M::walk(params_, shape_, rows);
    for (int32_t i = 0; i < walk.num_partial + walk.num_full; ++i) {
      load(walk.tile(i), shape_.k);
      visit(i < walk.num_partial);
    }
  }

  QueryTile const rows;
  Coord const extent;

 private:
  typename M::Params const& params_;
  TileShape const shape_;
};

// One half of the kernel's box of 128 rows, which is also a box.
template <>
class Group<Neighborhood> {
 public:
  static SPARSE_FMHA_HD int32_t count(Neighborhood::Params const& p, TileShape const& shape) {
    return 2 * Neighborhood::num_query_tiles(p, shape);
  }
  static SPARSE_FMHA_HD int64_t scratch_words(FmhaProblem const& /*problem*/) { return 0; }

  SPARSE_FMHA_HD Group(Neighborhood::Params const& p, TileShape const& shape, int32_t index,
                       uint32_t* /*scratch*/)
      : extent(half(shape.q)),
        params_(p),
        shape_(shape),
        whole_(Neighborhood::query_tile(p, shape, index / 2)) {
    Coord const offset = box_offset(shape.q, index % 2 * kGroupRows);
    rows = {
        whole_.residue,
        {whole_.origin[0] + offset[0], whole_.origin[1] + offset[1], whole_.origin[2] + offset[2]}};
  }

  // Walks the whole box; visits nothing where these rows see no key.
  template <class Load, class Visit>
  SPARSE_FMHA_HD void for_each_tile(Load load, Visit visit) const {
    auto const walk = Neighborhood::walk(params_, shape_, whole_);
    for (int32_t i = 0; i < walk.num_partial + walk.num_full; ++i) {
      load(walk.tile(i), shape_.k);
      visit(i < walk.num_partial);
    }
  }

  QueryTile rows;
  Coord const extent;

 private:
  static SPARSE_FMHA_HD Coord half(Coord const& box) {
    int32_t const x = min_int(box[2], kGroupRows);
    int32_t const y = min_int(box[1], kGroupRows / x);
    return {kGroupRows / x / y, y, x};
  }
  Neighborhood::Params const& params_;
  TileShape const shape_;
  QueryTile const whole_;
};

// Two query blocks of 64 rows share a query tile. Full blocks that both list come first, then the
// partial blocks and the other full ones; each in ascending order.
template <>
class Group<BlockSparse> {
 public:
  static SPARSE_FMHA_HD int32_t count(BlockSparse::Params const& p, TileShape const& /*shape*/) {
    return ceil_div(p.len_q, kGroupRows);
  }
  // Two bitmaps of the key blocks.
  static SPARSE_FMHA_HD int64_t scratch_words(FmhaProblem const& problem) {
    return 2 * int64_t{ceil_div(static_cast<int32_t>(volume(problem.grid_kv)), 16 * 32)};
  }

  SPARSE_FMHA_HD Group(BlockSparse::Params const& p, TileShape const& shape, int32_t index,
                       uint32_t* scratch)
      : rows{{0, 0, 0}, {0, 0, index * kGroupRows}},
        extent{1, 1, kGroupRows},
        params_(p),
        box_(shape.k[2]),
        boxes_(shape.k[1]),
        own_(scratch),
        others_(scratch + words()) {}

  template <class Load, class Visit>
  SPARSE_FMHA_HD void for_each_tile(Load load, Visit visit) const {
    int64_t const row = rows.origin[2] / params_.block_q;
    int32_t const partials = BlockSparse::count(params_.partial, row);
    int32_t const fulls = BlockSparse::count(params_.full, row);
    auto const* const partial = params_.partial.indices + row * params_.partial.width;
    auto const* const full = params_.full.indices + row * params_.full.width;
    Stream<Load, Visit> stream{*this, load, visit};
    if (params_.block_q == kGroupRows) {
      mark(own_, row);
      mark(others_, row ^ 1);
      for_each_block(own_, others_, ~0u, [&](int32_t block) { stream.take(block, 0); });
      stream.end();
    }
    for (int32_t i = 0; i < partials; ++i) {
      stream.take(partial[i], i + 1);
    }
    if (params_.block_q == kGroupRows) {
      for_each_block(own_, others_, 0u, [&](int32_t block) { stream.take(block, 0); });
    } else {
      for (int32_t i = 0; i < fulls; ++i) {
        stream.take(full[i], 0);
      }
    }
    stream.end();
  }

  QueryTile const rows;
  Coord const extent;

 private:
  // Loads boxes one after another; visits a stage when it is full.
  template <class Load, class Visit>
  struct Stream {
    Group const& group;
    Load const& load;
    Visit const& visit;
    int32_t taken = 0;
    bool masked = false;

    // `entry`: index in the partial list, from 1; 0 for a full block.
    SPARSE_FMHA_HD void take(int32_t block, int32_t entry) {
      BlockSparse::Params const& p = group.params_;
      bool const there = block >= 0 && block < ceil_div(p.len_kv, p.block_kv);
      for (int32_t part = 0; part < p.block_kv / group.box_; ++part) {
        if (there) {
          int32_t const first = block * p.block_kv + part * group.box_;
          masked |= entry > 0 || min_int(first + group.box_, p.len_kv) >
                                     BlockSparse::limit(p, group.rows.origin[2]);
          load(Coord{entry, 0, first}, Coord{1, 1, group.box_});
        }
        if (++taken == group.boxes_) {
          end();
        }
      }
    }
    SPARSE_FMHA_HD void end() {
      if (taken > 0) {
        visit(masked);
      }
      taken = 0;
      masked = false;
    }
  };

  SPARSE_FMHA_HD int32_t words() const {
    return ceil_div(ceil_div(params_.len_kv, params_.block_kv), 32);
  }
  SPARSE_FMHA_HD void mark(uint32_t* bitmap, int64_t row) const {
    for (int32_t w = 0; w < words(); ++w) {
      bitmap[w] = 0;
    }
    if (row * params_.block_q >= params_.len_q) {
      return;
    }
    for (int32_t i = 0; i < BlockSparse::count(params_.full, row); ++i) {
      int32_t const block = params_.full.indices[row * params_.full.width + i];
      if (block >= 0 && block < ceil_div(params_.len_kv, params_.block_kv)) {
        bitmap[block / 32] |= 1u << block % 32;
      }
    }
  }
  // Blocks of `a` whose bit in `b` equals `wanted`.
  template <class Body>
  SPARSE_FMHA_HD void for_each_block(uint32_t const* a, uint32_t const* b, uint32_t wanted,
                                     Body body) const {
    for (int32_t w = 0; w < words(); ++w) {
      for (uint32_t bits = a[w] & ~(b[w] ^ wanted); bits != 0; bits &= bits - 1) {
        body(w * 32 + __builtin_ctz(bits));
      }
    }
  }

  BlockSparse::Params const& params_;
  int32_t const box_;
  int32_t const boxes_;
  uint32_t* const own_;
  uint32_t* const others_;
};

// Runs of keys, several per tile, then the columns.
template <>
class Group<Stripe> {
 public:
  static SPARSE_FMHA_HD int32_t count(Stripe::Params const& p, TileShape const& /*shape*/) {
    return ceil_div(p.len_q, kGroupRows);
  }
  static SPARSE_FMHA_HD int64_t scratch_words(FmhaProblem const& /*problem*/) { return 0; }

  SPARSE_FMHA_HD Group(Stripe::Params const& p, TileShape const& shape, int32_t index,
                       uint32_t* /*scratch*/)
      : rows{{0, 0, 0}, {0, 0, index * kGroupRows}},
        extent{1, 1, kGroupRows},
        params_(p),
        keys_(shape.k[2]) {}

  template <class Load, class Visit>
  SPARSE_FMHA_HD void for_each_tile(Load load, Visit visit) const {
    Coord const runs = {1, 1, min_int(params_.range_size, keys_)};
    auto const walk = Stripe::walk(params_, {extent, runs}, rows);
    int32_t const in_tile = keys_ / runs[2];
    bool masked = false;
    for (int32_t i = 0; i < walk.num_ranges; ++i) {
      Coord const run = walk.tile(i);
      masked |= walk.is_cut(run);
      load(run, runs);
      if ((i + 1) % in_tile == 0 || i + 1 == walk.num_ranges) {
        visit(masked);
        masked = false;
      }
    }
    Coord const columns = {1, 1, keys_};
    Stripe::Walk by_columns = walk;
    by_columns.tile_k = keys_;
    by_columns.num_ranges = 0;
    int32_t const listed = BlockSparse::count(params_.columns, walk.group());
    for (int32_t i = 0; i < ceil_div(listed, keys_); ++i) {
      Coord const tile = by_columns.tile(i);
      load(tile, columns);
      visit(by_columns.is_cut(tile));
    }
  }

  QueryTile const rows;
  Coord const extent;

 private:
  Stripe::Params const& params_;
  int32_t const keys_;
};

}  // namespace sparse_fmha::cpu
