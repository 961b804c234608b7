// The contents of the stages of a query tile with lists of key blocks. Integer arithmetic, shared
// by the kernel and the host tests.
#pragma once

#include "sparse_fmha/mechanisms/block_sparse.h"
#include "sparse_fmha/planning/list_walk.h"

namespace sparse_fmha {

// How key blocks fill stages; sizes are powers of two. A stage holds boxes; a key block longer than
// a stage is split into several boxes.
struct BoxSizes {
  int32_t log2_box;    // keys of a box
  int32_t log2_boxes;  // boxes per stage
  int32_t log2_split;  // boxes per key block
};

inline BoxSizes box_sizes(int32_t block_kv, int32_t tile_k) {
  int32_t const box = min_int(block_kv, tile_k);
  return {log2_floor(box), log2_floor(tile_k / box), log2_floor(block_kv / box)};
}

// The key blocks of one stream of stages. Partial blocks come first.
struct ListStream {
  int32_t const* partial;
  int32_t const* full;
  uint8_t const* bits;  // of the partial ones
  int32_t partials;
  int32_t entries;
};

// Computed on the device before the kernel runs (list_plan.h).
struct ListPlan {
  int32_t const* order;   // [lists, query tiles]: heaviest first
  int32_t const* merged;  // [lists, query tiles, 2 * width], for query blocks of 64 rows:
  int32_t const*
      merged_counts;     // [lists, query tiles, 3]: full blocks of both, the first, the other
  int64_t batch_stride;  // in query tiles; 0 if the lists are shared
  int64_t head_stride;
};

// Full blocks, preceded by the partial blocks of a list row.
SPARSE_FMHA_HD ListStream list_stream(BlockSparse::Params const& p, int64_t row,
                                      int32_t const* full, int32_t fulls) {
  if (p.partial.counts == nullptr) {
    return {nullptr, full, nullptr, 0, fulls};
  }
  int32_t const partials = BlockSparse::count(p.partial, row);
  int64_t const first = row * p.partial.width;
  return {p.partial.indices + first, full, p.bits + first * BlockSparse::bits_bytes(p), partials,
          partials + fulls};
}

// The streams of a query tile: for both consumers, for the first, for the second.
SPARSE_FMHA_HD void find_streams(BlockSparse::Params const& p, ListPlan const& plan, int32_t batch,
                                 int32_t head, int32_t q_tile, ListStream (&streams)[3]) {
  int64_t const lists = batch * p.batch_stride + head * p.head_stride;
  if (p.block_q == 128) {
    int64_t const row = lists + q_tile;
    streams[0] =
        list_stream(p, row, p.full.indices + row * p.full.width, BlockSparse::count(p.full, row));
    streams[1] = {};
    streams[2] = {};
    return;
  }
  int64_t const row = lists + 2 * q_tile;
  int64_t const tile = batch * plan.batch_stride + head * plan.head_stride + q_tile;
  int32_t const* const counts = plan.merged_counts + 3 * tile;
  int32_t const* full = plan.merged + 2 * tile * p.full.width;
  streams[0] = {nullptr, full, nullptr, 0, counts[0]};
  full += counts[0];
  streams[1] = list_stream(p, row, full, counts[1]);
  full += counts[1];
  if ((2 * q_tile + 1) * 64 < p.len_q) {
    streams[2] = list_stream(p, row + 1, full, counts[2]);
  } else {
    streams[2] = {};
  }
}

SPARSE_FMHA_HD StreamStages count_stages(BoxSizes const& sizes, ListStream const (&streams)[3]) {
  int32_t const round_up = (1 << sizes.log2_boxes) - 1;
  auto stages = [&](ListStream const& stream) {
    return ((stream.entries << sizes.log2_split) + round_up) >> sizes.log2_boxes;
  };
  return {stages(streams[0]), stages(streams[1]), stages(streams[2])};
}

// One box of a stage of a stream.
struct ListBox {
  int32_t entry;  // index in the stream
  int32_t part;   // which part of the key block
  int32_t block;  // the entry's key block; negative if the stream has no such entry
};

SPARSE_FMHA_HD ListBox list_box(BoxSizes const& sizes, ListStream const& stream, int32_t stage,
                                int32_t box) {
  int32_t const i = (stage << sizes.log2_boxes) + box;
  int32_t const entry = i >> sizes.log2_split;
  int32_t const part = i & ((1 << sizes.log2_split) - 1);
  if (entry >= stream.entries) {
    return {entry, part, -1};
  }
  bool const partial = entry < stream.partials;
  int32_t const* const from = partial ? stream.partial : stream.full;
  return {entry, part, from[partial ? entry : entry - stream.partials]};
}

// The origin of a box that does not exist: past every key.
inline constexpr int32_t kAbsent = 1 << 30;

// First key of a box. Key blocks that do not exist count as not listed.
SPARSE_FMHA_HD int32_t box_origin(BlockSparse::Params const& p, BoxSizes const& sizes,
                                  ListBox const& box) {
  bool const there = box.block >= 0 && box.block < ceil_div(p.len_kv, p.block_kv);
  return there ? box.block * p.block_kv + (box.part << sizes.log2_box) : kAbsent;
}

// Whether all rows from `first_query` see all of a key block that has no bitmask.
SPARSE_FMHA_HD bool is_whole(BlockSparse::Params const& p, int32_t block, int32_t first_query) {
  return block >= 0 && block < BlockSparse::limit(p, first_query) / p.block_kv;
}

// The whole stages of a stream of `boxes` boxes, the first `masked` of which may be masked.
SPARSE_FMHA_HD WholeStages whole_stages(int32_t log2_boxes, int32_t masked, int32_t boxes) {
  int32_t const begin = (masked + (1 << log2_boxes) - 1) >> log2_boxes;
  int32_t const end = boxes >> log2_boxes;
  return {begin, end > begin ? end : begin};
}
// `first_masked`: index of the first full block that is not whole, or their number.
SPARSE_FMHA_HD WholeStages whole_stages(BoxSizes const& sizes, ListStream const& stream,
                                        int32_t first_masked) {
  return whole_stages(sizes.log2_boxes, stream.partials << sizes.log2_split,
                      (stream.partials + first_masked) << sizes.log2_split);
}

// A word with the first n of 32 columns, for any n.
SPARSE_FMHA_HD uint32_t first_columns(int32_t n) {
  return n >= 32 ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1;
}

// Which of columns [32 * word, 32 * word + 32) of a stage a row sees. `origins`: first keys of the
// boxes. `with_bits`: which boxes have a bitmask. `bits`: the bitmasks, one after another by box.
// `row`: the row in them. Each part of a split key block has the block's whole bitmask.
SPARSE_FMHA_HD uint32_t seen_columns(BlockSparse::Params const& p, BoxSizes const& sizes,
                                     int32_t const* origins, uint32_t with_bits,
                                     uint8_t const* bits, int32_t row, int32_t limit,
                                     int32_t word) {
  int32_t const box_mask = (1 << sizes.log2_box) - 1;
  int32_t const row_bytes = p.block_kv / 8;
  auto piece = [&](int32_t column, bool half_word) {
    int32_t const box = column >> sizes.log2_box;
    int32_t const inside = column & box_mask;
    uint32_t seen = first_columns(limit - origins[box] - inside);
    if (with_bits >> box & 1) {
      int32_t const column_in_block = (origins[box] & (p.block_kv - 1)) + inside;
      uint8_t const* const from =
          bits + box * BlockSparse::bits_bytes(p) + row * row_bytes + column_in_block / 8;
      seen &= half_word ? *reinterpret_cast<uint16_t const*>(from)
                        : *reinterpret_cast<uint32_t const*>(from);
    }
    return half_word ? seen & 0xffff : seen;
  };
  return sizes.log2_box >= 5 ? piece(32 * word, false)
                             : piece(32 * word, true) | piece(32 * word + 16, true) << 16;
}

}  // namespace sparse_fmha
