// The keys of a group of few rows: where they are, and which rows see them.
#pragma once

#include "sparse_fmha/sm90/decode/few_rows/params.h"

namespace sparse_fmha::sm90 {

// What device/decode/piece_keys.h says of any group, in fewer instructions: they are executed once,
// before the first copy. A group is one list's queries; there are no trees, and spans have no
// pages.
struct FewRowsKeys {
  DecodeKeys const& all;
  DecodeParams::Group const at;
  KeyRange rows;   // packed
  KeyRange range;  // positions that the head has
  KeyRange some_see, all_see;
  KeyRange slots;  // from the first to the last that some row may see
  int32_t first_query;

  __device__ __forceinline__ FewRowsKeys(FewRowsParams const& params)
      : all(params.keys), at(group_of(params)) {
    int32_t const queries = all.by_query ? 1 : all.len_q;
    first_query = all.by_query ? at.row_group : 0;
    rows.begin = first_query * all.group;
    rows.end = rows.begin + queries * all.group;
    range = all.range(at.batch, at.head);
    // Both ends of what queries see grow with the query.
    KeyRange const first = all.visible(range, first_query);
    KeyRange const last = queries == 1 ? first : all.visible(range, first_query + queries - 1);
    some_see = {first.begin, last.end};
    all_see = {last.begin, first.end};
    bool const listed = all.form == DecodeKeys::Form::kBlocks;
    slots.begin = listed ? 0 : first.begin - range.begin;
    slots.end = listed ? all.slots(range, at.batch, first_query, at.head) : last.end - range.begin;
    if (slots.begin >= slots.end) {
      slots = {0, 0};
    }
  }

  struct Place {
    int32_t position;  // or -1
    int32_t outer;     // batch entry or page
    int32_t row;       // in it
  };
  // Of a slot below slots.end. The page may still be on its way.
  __device__ __forceinline__ Place place_of(int32_t slot) const {
    int32_t const position = all.form == DecodeKeys::Form::kRange
                                 ? range.begin + slot
                                 : all.position(range, at.batch, first_query, at.head, slot);
    if (all.page == 0 || position < 0) {
      return {position, at.batch, position};
    }
    int32_t const page =
        static_cast<int32_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(all.page));
    return {position, all.page_table.at(at.batch, 0, at.head, page), position - page * all.page};
  }
  __device__ __forceinline__ bool exists(Place const& place) const {
    bool const has_page = static_cast<uint32_t>(place.outer) < static_cast<uint32_t>(all.pages);
    return place.position >= 0 && (all.page == 0 || has_page);
  }
  // Of the positions [begin, begin + count).
  __device__ __forceinline__ bool all_rows_see(int32_t begin, int32_t count) const {
    return begin >= all_see.begin && begin <= all_see.end - count;
  }
  __device__ __forceinline__ bool some_row_may_see(int32_t begin, int32_t count = 1) const {
    return begin < some_see.end && begin > some_see.begin - count;
  }

 private:
  // Blocks are numbered by block of the cluster, group of the request, and request.
  static __device__ __forceinline__ DecodeParams::Group group_of(FewRowsParams const& params) {
    auto const batch = static_cast<int32_t>(blockIdx.z);
    auto const group = static_cast<int32_t>(blockIdx.y);
    if (params.row_groups == 1) {
      return {batch, group, 0};
    }
    return {batch, group / params.row_groups, group % params.row_groups};
  }
};

}  // namespace sparse_fmha::sm90
