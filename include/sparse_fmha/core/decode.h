// The keys of decode attention as plain data, and the integer arithmetic of its work: which rows of
// a cache a KV head reads, in which tiles, and what each query sees of them.
//
// A KV head's keys are numbered by slots: the positions of a range, the places of a list of blocks,
// or the entries of a list of tokens. Tiles and splits are cut at multiples of their size in slots,
// so they depend on the request alone. Lengths, tables and lists may hold any numbers: lengths are
// clamped, and entries that are out of range are ignored.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha {

// An int32 tensor. Strides are in entries, and 0 where an axis is missing or shared.
struct IndexTable {
  int32_t const* data = nullptr;
  int64_t batch_stride = 0;
  int64_t query_stride = 0;
  int64_t head_stride = 0;
  int64_t stride = 0;
  int32_t width = 0;

  SPARSE_FMHA_HD int32_t at(int32_t batch, int32_t query, int32_t head, int32_t i = 0) const {
    return data[batch * batch_stride + query * query_stride + head * head_stride + i * stride];
  }
};

struct KeyRange {
  int32_t begin;
  int32_t end;
};

struct DecodeKeys {
  static constexpr int32_t kTile = 64;  // slots
  static constexpr int32_t kRows = 64;  // packed rows that are computed, and vote, together
  enum class Form : int32_t { kRange, kBlocks, kTokens };

  Form form = Form::kRange;
  int32_t capacity = 0;   // most rows that a request can have
  int32_t page = 0;       // rows of a page; 0: a contiguous cache
  int32_t pages = 0;      // of the cache
  IndexTable lengths;     // keys, with the new ones
  IndexTable page_table;  // if page > 0
  IndexTable starts;      // of kRange, with span_lengths; nullptr: everything
  IndexTable span_lengths;
  IndexTable entries;     // of lists
  IndexTable counts;      // nullptr: all entries
  bool by_query = false;  // a list for each query
  int32_t block = 0;      // keys of an entry of kBlocks
  IndexTable tree;        // bits over the new keys; nullptr: causal decides
  int32_t len_q = 0;
  int32_t group = 0;  // query heads of a KV head
  bool causal = true;
  int32_t window = 0;           // keys up to the query's own; 0: all
  int32_t split = 0;            // slots, a multiple of kTile; 0: kernels cut as they like
  float const* sink = nullptr;  // per query head
  int64_t sink_stride = 0;

  // Packed row = query * group + query head within the group.
  SPARSE_FMHA_HD int32_t groups_of_list() const {
    return ceil_div(by_query ? group : len_q * group, kRows);
  }
  SPARSE_FMHA_HD int32_t row_groups() const { return groups_of_list() * (by_query ? len_q : 1); }
  SPARSE_FMHA_HD KeyRange rows_of(int32_t row_group) const {
    int32_t const of_list = by_query ? group : len_q * group;
    int32_t const list = row_group / groups_of_list();
    int32_t const first = row_group % groups_of_list() * kRows;
    return {list * of_list + first, list * of_list + min_int(first + kRows, of_list)};
  }

  // The positions that the head has, as rows of the request's cache.
  SPARSE_FMHA_HD KeyRange range(int32_t batch, int32_t head) const {
    int32_t const length = max_int(0, min_int(lengths.at(batch, 0, head), capacity));
    if (starts.data == nullptr) {
      return {0, length};
    }
    int64_t const start = starts.at(batch, 0, head);
    int64_t const stop = start + span_lengths.at(batch, 0, head);
    int32_t const begin = static_cast<int32_t>(start < 0 ? 0 : start < length ? start : length);
    return {begin, static_cast<int32_t>(stop < begin ? begin : stop < length ? stop : length)};
  }

  // What a query sees of a range, apart from lists and trees.
  SPARSE_FMHA_HD KeyRange visible(KeyRange range, int32_t query) const {
    int64_t const own = int64_t{range.end} - len_q + query;
    bool const ends = causal && tree.data == nullptr;
    int64_t const end = ends && own + 1 < range.end ? own + 1 : range.end;
    int64_t const begin = window > 0 ? own - window + 1 : 0;
    return {begin > range.begin ? static_cast<int32_t>(begin) : range.begin,
            static_cast<int32_t>(end > 0 ? end : 0)};
  }
  // Whether a tree shows a query the key at a position.
  SPARSE_FMHA_HD bool in_tree(KeyRange range, int32_t batch, int32_t query,
                              int32_t position) const {
    int32_t const bit = position - (range.end - len_q);
    return bit < 0 || (static_cast<uint32_t>(tree.at(batch, query, 0, bit / 32)) >> bit % 32 & 1);
  }

  // The slots of a range or list.
  SPARSE_FMHA_HD int32_t slots(KeyRange range, int32_t batch, int32_t query, int32_t head) const {
    if (form == Form::kRange) {
      return range.end - range.begin;
    }
    int32_t const count = counts.data == nullptr ? entries.width : counts.at(batch, query, head);
    int32_t const listed = max_int(0, min_int(count, entries.width));
    return form == Form::kBlocks ? listed * block : listed;
  }
  // The position of a slot, or -1: perhaps not one of the range's.
  SPARSE_FMHA_HD int32_t position(KeyRange range, int32_t batch, int32_t query, int32_t head,
                                  int32_t slot) const {
    if (form == Form::kRange) {
      return range.begin + slot;
    }
    if (form == Form::kTokens) {
      return entries.at(batch, query, head, slot);
    }
    int32_t const entry = entries.at(batch, query, head, slot / block);
    int64_t const at = int64_t{entry} * block + slot % block;
    return at < 0 || at >= range.end ? -1 : static_cast<int32_t>(at);
  }
};

}  // namespace sparse_fmha
