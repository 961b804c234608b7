// The slots of a piece: where their keys are, and which rows see them.
#pragma once

#include "sparse_fmha/device/decode/pieces.h"

namespace sparse_fmha::device {

class PieceKeys {
 public:
  __device__ __forceinline__ PieceKeys(DecodeParams const& params, DecodePiece const& piece)
      : keys_(params.keys), at_(piece.at), range_(keys_.range(at_.batch, at_.head)) {
    KeyRange const rows = keys_.rows_of(at_.row_group);
    first_query_ = rows.begin / keys_.group;
    last_query_ = (rows.end - 1) / keys_.group;
    // Both ends of what queries see grow with the query, or are the same for all.
    KeyRange const first = keys_.visible(range_, first_query_);
    KeyRange const last = keys_.visible(range_, last_query_);
    some_see_ = {first.begin, last.end};
    all_see_ = {last.begin, first.end};
    if (keys_.tree.data != nullptr) {
      all_see_.end = min_int(all_see_.end, range_.end - keys_.len_q);
    }
    slots_ = keys_.slots(range_, at_.batch, first_query_, at_.head);
  }

  // The position of a slot, or -1 if there is none.
  __device__ __forceinline__ int32_t position(int64_t slot) const {
    return slot < slots_ ? keys_.position(range_, at_.batch, first_query_, at_.head,
                                          static_cast<int32_t>(slot))
                         : -1;
  }
  // Of the positions [begin, begin + count): whether all rows see all, and some row may see some.
  __device__ __forceinline__ bool all_rows_see(int32_t begin, int32_t count = 1) const {
    return begin >= all_see_.begin && int64_t{begin} + count <= all_see_.end;
  }
  __device__ __forceinline__ bool some_row_may_see(int32_t begin, int32_t count = 1) const {
    return begin < some_see_.end && int64_t{begin} + count > some_see_.begin;
  }
  __device__ __forceinline__ bool some_row_sees(int32_t position) const {
    bool seen = some_row_may_see(position);
    if (keys_.tree.data != nullptr && seen) {
      seen = false;
      CUTE_NO_UNROLL
      for (int32_t query = first_query_; query <= last_query_ && !seen; ++query) {
        seen = keys_.in_tree(range_, at_.batch, query, position);
      }
    }
    return seen;
  }

  struct Place {
    int32_t position;  // or -1
    int32_t outer;     // batch entry or page
    int32_t row;       // in it
  };
  __device__ __forceinline__ Place place_of(int32_t position) const {
    if (position < 0 || keys_.page == 0) {
      return {position, at_.batch, position};
    }
    return {position, keys_.page_table.at(at_.batch, 0, at_.head, position / keys_.page),
            position % keys_.page};
  }
  // Uses what place_of() loaded.
  __device__ __forceinline__ bool exists(Place const& place) const {
    bool const has_page = place.outer >= 0 && place.outer < keys_.pages;
    return place.position >= 0 && (keys_.page == 0 || has_page);
  }

 private:
  DecodeKeys const& keys_;
  DecodeParams::Group const at_;
  KeyRange const range_;
  int32_t first_query_, last_query_, slots_;
  KeyRange some_see_, all_see_;
};

}  // namespace sparse_fmha::device
