// Which query rows see which keys through lists, for the gradients of keys. Integer arithmetic,
// shared by the kernels and the host tests.
//
// Keys are in parts of 64, one per consumer warpgroup, and query rows in steps of 64. A row of a
// bitmap has a bit for each step that sees a part. What a masked step hides is looked up in the
// lists again, so these are kept as bitmaps, too. Stripes are lists of blocks of one key.
#pragma once

#include "sparse_fmha/planning/stripe_stages.h"

namespace sparse_fmha {

inline constexpr int32_t kPartKeys = 64;
inline constexpr int32_t kStepRows = 64;

SPARSE_FMHA_HD int32_t count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}
// The index of the only set bit.
SPARSE_FMHA_HD int32_t lowest_bit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int32_t>(x)) - 1;
#else
  return __builtin_ctz(x);
#endif
}

// Computed on the device before the kernel runs (device/transposed_lists.h). A row is a list and a
// query block (a group of stripes), in the order of the lists; a word has 32 key blocks, or 32 keys
// of stripes. `partial`, `ranks` and `slots` are for block lists only.
struct TransposedLists {
  uint32_t const* full;     // [rows, words]: listed key blocks or keys
  uint32_t const* partial;  // [rows, words]
  int32_t const* ranks;     // [rows, words]: number of partial blocks in earlier words
  int32_t const* slots;     // [rows, partial.width]: list indices of the partial blocks, in
                            // ascending order of the blocks
  uint32_t const* seen;     // [lists, parts, step words]: steps in which some row may see a key
  uint32_t const* masked;   // [lists, parts, step words]: steps in which not all rows see all keys
  int32_t const* counts;    // [lists of key heads, key tiles, 3]: steps of the tile, and of each of
                            // its parts
  int32_t const* order;     // [lists of key heads, key tiles]: heaviest first
  int32_t words;
  int32_t step_words;
  int32_t parts;  // rounded up to whole key tiles
  int32_t key_tiles;
  // List index: these strides times batch entry and query head; the others, for a key head's list.
  int32_t batch_stride;
  int32_t head_stride;
  int32_t batch_stride_kv;
};

// The key blocks of a part, as bits of one word. A key block of 128 has two parts.
struct PartBlocks {
  int32_t word;
  uint32_t there;  // without blocks past the last key
};

SPARSE_FMHA_HD PartBlocks part_blocks(BlockSparse::Params const& p, int32_t part) {
  int32_t const first = part * kPartKeys / p.block_kv;
  int32_t const word = first / 32;
  uint32_t const blocks = first_columns(max_int(kPartKeys / p.block_kv, 1)) << first % 32;
  return {word, blocks & first_columns(ceil_div(p.len_kv, p.block_kv) - 32 * word)};
}

// How a step of query rows uses a part of the keys.
struct PartUse {
  bool seen;
  bool masked;
};

// For block lists. `full` and `partial` are the words of the part's key blocks in the bitmaps of
// the rows' query block.
SPARSE_FMHA_HD PartUse part_use(BlockSparse::Params const& p, int32_t part, int32_t step,
                                uint32_t full, uint32_t partial) {
  PartBlocks const blocks = part_blocks(p, part);
  uint32_t const listed = (full | partial) & blocks.there;
  int32_t const first_query = step * kStepRows;
  int32_t const last_query = min_int(first_query + kStepRows, p.len_q) - 1;
  if (listed == 0) {
    return {false, false};
  }
  int32_t const first_key =
      max_int((32 * blocks.word + lowest_bit(listed)) * p.block_kv, part * kPartKeys);
  if (first_key >= BlockSparse::limit(p, last_query)) {
    return {false, false};
  }
  // A part with keys out of range is masked: their weights may overflow.
  int32_t const end_key = (part + 1) * kPartKeys;
  bool const whole =
      (full & blocks.there) == blocks.there && end_key <= BlockSparse::limit(p, first_query);
  return {true, !whole};
}

// The words of a query row for the key blocks of a tile. `rank`: partial blocks in earlier words.
struct RowBlocks {
  uint32_t full;
  uint32_t partial;
  int32_t rank;
};

SPARSE_FMHA_HD RowBlocks row_blocks(BlockSparse::Params const& p, TransposedLists const& lists,
                                    int64_t row, int32_t part) {
  int64_t const at = row * lists.words + part_blocks(p, part).word;
  if (p.partial.counts == nullptr) {
    return {lists.full[at], 0, 0};
  }
  return {lists.full[at], lists.partial[at], lists.ranks[at]};
}

// How query rows list the i-th key block of a tile: the index of a partial block, or one of these.
inline constexpr int32_t kFullBlock = -1;
inline constexpr int32_t kNoBlock = -2;

SPARSE_FMHA_HD int32_t tile_entries(BlockSparse::Params const& p, int32_t tile_k) {
  return max_int(tile_k / p.block_kv, 1);
}
SPARSE_FMHA_HD int32_t tile_entry(BlockSparse::Params const& p, TransposedLists const& lists,
                                  int64_t row, int32_t first_key, int32_t i) {
  RowBlocks const blocks = row_blocks(p, lists, row, first_key / kPartKeys);
  int32_t const bit = (first_key / p.block_kv + i) % 32;
  if ((blocks.partial >> bit & 1) != 0) {
    int32_t const before = count_bits(blocks.partial & first_columns(bit));
    return lists.slots[row * p.partial.width + blocks.rank + before];
  }
  return (blocks.full >> bit & 1) != 0 ? kFullBlock : kNoBlock;
}

// Which of 32 keys a query sees, starting at `offset` in the tile that starts at `first_key`.
// entry(i) is the tile's i-th entry. If the mask has partial blocks, memory is read for each block,
// so that reads do not wait for each other.
template <class Entry>
SPARSE_FMHA_HD uint32_t seen_keys(BlockSparse::Params const& p, TransposedLists const& lists,
                                  int64_t row, Entry const& entry, int32_t first_key,
                                  int32_t offset, int32_t query) {
  auto piece = [&](int32_t place, bool half_word) -> uint32_t {
    int32_t const found = entry(place / p.block_kv);
    uint32_t const all = half_word ? 0xffff : 0xffffffff;
    if (p.partial.counts == nullptr) {
      return found == kFullBlock ? all : 0;
    }
    int64_t const bits_row = (row * p.partial.width + found) * p.block_q + query % p.block_q;
    int64_t const byte = bits_row * (p.block_kv / 8) + (first_key + place) % p.block_kv / 8;
    auto const* const from =
        found >= 0 ? p.bits + byte : reinterpret_cast<uint8_t const*>(lists.full);
    uint32_t const bits = half_word ? *reinterpret_cast<uint16_t const*>(from)
                                    : *reinterpret_cast<uint32_t const*>(from);
    return found >= 0 ? bits : found == kFullBlock ? all : 0;
  };
  uint32_t const seen = p.block_kv >= 32 ? piece(offset, false)
                                         : piece(offset, true) | piece(offset + 16, true) << 16;
  return seen & first_columns(BlockSparse::limit(p, query) - first_key - offset);
}

// For block lists, by the bitmaps of `row`, the row of the step.
SPARSE_FMHA_HD PartUse part_use(BlockSparse::Params const& p, TransposedLists const& lists,
                                int64_t row, int32_t part, int32_t step) {
  RowBlocks const blocks = row_blocks(p, lists, row, part);
  return part_use(p, part, step, blocks.full, blocks.partial);
}

// For stripes, whose parts have two words.
SPARSE_FMHA_HD PartUse part_use(Stripe::Params const& p, TransposedLists const& lists, int64_t row,
                                int32_t part, int32_t step) {
  int32_t const first_query = step * kStepRows;
  int32_t const last_query = min_int(first_query + kStepRows, p.len_q) - 1;
  int32_t const first_key = part * kPartKeys;
  int32_t const keys = min_int(p.len_kv - first_key, kPartKeys);
  int32_t const first_limit = Stripe::limit(p, first_query) - first_key;
  int32_t const last_limit = Stripe::limit(p, last_query) - first_key;
  PartUse use = {false, keys > first_limit};
  for (int32_t i = 0; i < 2; ++i) {
    int32_t const word = 2 * part + i;
    uint32_t const listed = word < lists.words ? lists.full[row * lists.words + word] : 0;
    use.seen = use.seen || (listed & first_columns(last_limit - 32 * i)) != 0;
    use.masked = use.masked || listed != first_columns(keys - 32 * i);
  }
  return {use.seen, use.seen && use.masked};
}
// For stripes, an entry is a word of the tile's keys.
SPARSE_FMHA_HD int32_t tile_entries(Stripe::Params const& /*p*/, int32_t tile_k) {
  return tile_k / 32;
}
SPARSE_FMHA_HD int32_t tile_entry(Stripe::Params const& /*p*/, TransposedLists const& lists,
                                  int64_t row, int32_t first_key, int32_t i) {
  int32_t const word = first_key / 32 + i;
  return static_cast<int32_t>(word < lists.words ? lists.full[row * lists.words + word] : 0);
}
template <class Entry>
SPARSE_FMHA_HD uint32_t seen_keys(Stripe::Params const& p, TransposedLists const& /*lists*/,
                                  int64_t /*row*/, Entry const& entry, int32_t first_key,
                                  int32_t offset, int32_t query) {
  return static_cast<uint32_t>(entry(offset / 32)) &
         first_columns(Stripe::limit(p, query) - first_key - offset);
}

// A step whose queries all see the same keys of a tile needs no mask for each of them: one lane
// looks up a key. For block lists alone. Sizes of blocks are powers of two; a warp that makes masks
// must not divide.

// Rows of a list, and which of them a query has.
SPARSE_FMHA_HD int32_t row_of(BlockSparse::Params const& p, int32_t query) {
  return query >> lowest_bit(static_cast<uint32_t>(p.block_q));
}
SPARSE_FMHA_HD int32_t row_of(Stripe::Params const& p, int32_t query) { return query / p.block_q; }
template <class Params>
SPARSE_FMHA_HD int32_t row_count(Params const& p) {
  return row_of(p, p.len_q + p.block_q - 1);
}

// Whether a row lists a key in full. The first key of its tile exists.
SPARSE_FMHA_HD bool lists_key(BlockSparse::Params const& p, TransposedLists const& lists,
                              int64_t row, int32_t key) {
  int32_t const block = key >> lowest_bit(static_cast<uint32_t>(p.block_kv));
  return (lists.full[row * lists.words + block / 32] >> block % 32 & 1) != 0;
}

// Whether queries of a row may differ by a bitmask in the tile of `first_key`.
SPARSE_FMHA_HD bool has_bitmask(BlockSparse::Params const& p, TransposedLists const& lists,
                                int64_t row, int32_t first_key, int32_t tile_k) {
  if (p.partial.counts == nullptr) {
    return false;
  }
  int32_t const log2_keys = lowest_bit(static_cast<uint32_t>(p.block_kv));
  int32_t const first = first_key >> log2_keys;
  uint32_t const blocks = first_columns(max_int(tile_k >> log2_keys, 1));
  return (lists.partial[row * lists.words + first / 32] >> first % 32 & blocks) != 0;
}

// Whether all queries of the step of `first_query` see the same keys before `end_key`, as far as
// the diagonal says.
SPARSE_FMHA_HD bool have_one_limit(BlockSparse::Params const& p, int32_t first_query,
                                   int32_t end_key) {
  int32_t const last_query = min_int(first_query + kStepRows, p.len_q) - 1;
  int32_t const most = min_int(BlockSparse::limit(p, last_query), end_key);
  return BlockSparse::limit(p, first_query) >= most;
}

// Transposes 32 rows of 32 bits, one row per lane, in five exchanges with lanes at distance 16, 8,
// 4, 2, 1. Returns a lane's word after one of them.
SPARSE_FMHA_HD uint32_t exchange(uint32_t mine, uint32_t others, int32_t lane, int32_t distance) {
  uint32_t low = 0xffffffff;  // bits whose index lacks `distance`
  for (int32_t d = 16; d >= distance; d /= 2) {
    low ^= low << d;
  }
  return (lane & distance) == 0 ? (mine & low) | (others & low) << distance
                                : (mine & ~low) | (others >> distance & low);
}

// Which query of a step a lane has in the word of a half. The order places the bits that a thread
// of the accumulator needs next to each other: of the four threads of a row, two have the columns
// in each half, 16 each.
SPARSE_FMHA_HD int32_t query_of_lane(int32_t half, int32_t lane) {
  int32_t const thread = 2 * half + lane / 16;
  return lane % 16 / 2 * 8 + thread * 2 + lane % 2;
}

}  // namespace sparse_fmha
