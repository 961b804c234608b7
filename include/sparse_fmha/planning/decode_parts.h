// How the keys of a decode call are shared among thread blocks: integer arithmetic for host and
// device.
//
// A group (request, KV head, group of rows) has units of keys: tiles, or splits if the caller asks
// for fixed ones. The units of all groups in order are cut into parts of equal size. What a part
// has of a group is a piece, and the pieces of a group are merged in order.
#pragma once

#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {

struct DecodeParts {
  int64_t units;
  int64_t parts;

  SPARSE_FMHA_HD int64_t begin(int64_t part) const {
    return part / parts * units + part % parts * units / parts;
  }
  // The part that has a unit.
  SPARSE_FMHA_HD int64_t part_of(int64_t unit) const { return ((unit + 1) * parts - 1) / units; }
  // Where the result of a piece is kept: in order, and no two pieces have the same place.
  static SPARSE_FMHA_HD int64_t place(int64_t part, int64_t group) { return part + group; }
};

// The group that has a unit: first[g] is the first unit of group g, first[groups] their number.
SPARSE_FMHA_HD int32_t decode_group_of(int64_t const* first, int32_t groups, int64_t unit) {
  int32_t low = 0;
  int32_t high = groups;
  while (high - low > 1) {
    int32_t const middle = low + (high - low) / 2;
    (first[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// The tiles [begin, end) with slots that the rows of a group may see. With fixed splits `begin` is
// the start of one.
SPARSE_FMHA_HD KeyRange decode_tiles(DecodeKeys const& keys, int32_t batch, int32_t head,
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
  if (begin >= end) {
    return {0, 0};
  }
  int32_t const unit = keys.split > 0 ? keys.split : DecodeKeys::kTile;
  return {begin / unit * (unit / DecodeKeys::kTile), (end - 1) / DecodeKeys::kTile + 1};
}

}  // namespace sparse_fmha
