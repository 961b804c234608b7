// How the keys of a decode call are shared among thread blocks: integer arithmetic for host and
// device.
//
// A group (request, KV head, group of rows) has units of keys: tiles, or splits if the caller asks
// for fixed ones. The units of all groups in order are cut into parts. What a part has of a group
// is a piece, and the pieces of a group are merged in order.
#pragma once

#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {

// Multiprocessors do not read equally fast. So each worker has one long part, and the rest is cut
// into short ones, which workers take when they are ready. Where a worker has few units, the parts
// are equal, one for each worker.
class DecodeParts {
 public:
  static constexpr int32_t kFewUnits = 16;       // of a worker
  static constexpr int32_t kShortestPart = 4;    // units
  static constexpr int32_t kMostShortParts = 4;  // of a worker

  // `short_parts`: most of a worker, at most kMostShortParts.
  SPARSE_FMHA_HD DecodeParts(int32_t units, int32_t workers, int32_t short_parts) : units_(units) {
    int32_t const share = units / workers;
    if (share >= kFewUnits) {
      long_parts_ = workers;
      long_size_ = share * 7 / 10;
      int32_t const rest = units - long_parts_ * long_size_;
      short_size_ = max_int(kShortestPart, ceil_div(rest, workers * short_parts));
    } else {
      short_size_ = max_int(1, ceil_div(units, workers));
    }
    count_ = long_parts_ + ceil_div(units - long_parts_ * long_size_, short_size_);
  }
  // A part for each unit.
  explicit SPARSE_FMHA_HD DecodeParts(int32_t units) : units_(units), count_(units) {}

  // Groups of many rows have large results: fewer parts keep them small.
  static SPARSE_FMHA_HD int32_t short_parts(int32_t rows) {
    return rows <= 16 ? kMostShortParts : 2;
  }
  // The most parts of any number of units up to `most_units`.
  static SPARSE_FMHA_HD int64_t most_count(int64_t most_units, int64_t workers,
                                           int32_t short_parts) {
    return most_units < workers * kFewUnits ? workers : workers * (1 + short_parts) + 1;
  }

  SPARSE_FMHA_HD int32_t count() const { return count_; }
  SPARSE_FMHA_HD int32_t begin(int32_t part) const {
    return part < long_parts_
               ? part * long_size_
               : min_int(units_, long_parts_ * long_size_ + (part - long_parts_) * short_size_);
  }
  // The part that has a unit.
  SPARSE_FMHA_HD int32_t part_of(int32_t unit) const {
    int32_t const of_long = long_parts_ * long_size_;
    return unit < of_long ? unit / long_size_ : long_parts_ + (unit - of_long) / short_size_;
  }

  // Where the result of a piece that is merged is kept; no two pieces have the same place. A part
  // has at most two such pieces: one that begins its group, and one that goes on with a group.
  static SPARSE_FMHA_HD int64_t place(int32_t part, bool begins) {
    return 2 * int64_t{part} + begins;
  }
  static SPARSE_FMHA_HD int64_t places(int64_t parts) { return 2 * parts; }

 private:
  int32_t units_;
  int32_t count_;
  int32_t long_parts_ = 0;  // before the short ones
  int32_t long_size_ = 1;
  int32_t short_size_ = 1;  // of the last part: at most
};

// The group that has a unit: first[g] is the first unit of group g, first[groups] their number.
SPARSE_FMHA_HD int32_t decode_group_of(int32_t const* first, int32_t groups, int32_t unit) {
  int32_t low = 0;
  int32_t high = groups;
  while (high - low > 1) {
    int32_t const middle = low + (high - low) / 2;
    (first[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// The slots [begin, end) from the first to the last that some row of a group may see.
SPARSE_FMHA_HD KeyRange decode_slots(DecodeKeys const& keys, int32_t batch, int32_t head,
                                     int32_t row_group) {
  KeyRange const rows = keys.rows_of(row_group);
  int32_t const query = rows.begin / keys.group;
  KeyRange const range = keys.range(batch, head);
  int32_t end = keys.slots(range, batch, query, head);
  int32_t begin = 0;
  if (keys.form == DecodeKeys::Form::kRange) {  // slots are in order of the positions
    begin = keys.visible(range, query).begin - range.begin;
    end = keys.visible(range, (rows.end - 1) / keys.group).end - range.begin;
  }
  return begin < end ? KeyRange{begin, end} : KeyRange{0, 0};
}

// The tiles with these slots. With fixed splits `begin` is the start of one.
SPARSE_FMHA_HD KeyRange decode_tiles(DecodeKeys const& keys, int32_t batch, int32_t head,
                                     int32_t row_group) {
  KeyRange const slots = decode_slots(keys, batch, head, row_group);
  int32_t const unit = keys.split > 0 ? keys.split : DecodeKeys::kTile;
  return {slots.begin / unit * (unit / DecodeKeys::kTile), ceil_div(slots.end, DecodeKeys::kTile)};
}

}  // namespace sparse_fmha
