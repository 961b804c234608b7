// Sizes of a decode call that follow from its shapes alone. Integer arithmetic for the host.
#pragma once

#include <numeric>

#include "sparse_fmha/core/decode.h"

namespace sparse_fmha {

// Lists may have more slots than 32 bits hold.
inline int64_t ceil_div_64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The keys of a copy: slots from a multiple of this number on are consecutive rows of a cache. Zero
// if keys have to be gathered one by one.
inline int32_t decode_box(DecodeKeys const& keys, int32_t tile) {
  constexpr int32_t kSmallest = 16;  // smaller boxes are slower than single rows
  bool const spans = keys.starts.data != nullptr;
  if (keys.form == DecodeKeys::Form::kTokens || (spans && keys.page > 0)) {
    return 0;
  }
  int32_t box = tile;
  for (int32_t run : {keys.page, keys.form == DecodeKeys::Form::kBlocks ? keys.block : 0}) {
    box = std::gcd(box, run);
  }
  return box >= kSmallest ? box : 0;
}

// The slots that a request can have.
inline int64_t most_slots(DecodeKeys const& keys) {
  return keys.form == DecodeKeys::Form::kRange    ? keys.capacity
         : keys.form == DecodeKeys::Form::kBlocks ? int64_t{keys.entries.width} * keys.block
                                                  : keys.entries.width;
}

}  // namespace sparse_fmha
