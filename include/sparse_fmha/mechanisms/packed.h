// Dense or causal attention of one of several sequences that share a dimension of tokens.
#pragma once

#include "sparse_fmha/mechanisms/dense.h"

namespace sparse_fmha {

// How many keys of a sequence lie before one of its positions: fewer than positions where pages are
// missing.
struct KeysBefore {
  int32_t const* pages_before;  // [pages + 1], how many earlier pages exist; nullptr: all do
  int32_t page_size;

  SPARSE_FMHA_HD int32_t operator()(int32_t position) const {
    if (pages_before == nullptr) {
      return position;
    }
    int32_t const page = position / page_size;
    int32_t const before = pages_before[page];
    bool const exists = pages_before[page + 1] > before;
    return before * page_size + (exists ? position - page * page_size : 0);
  }
};

// Query q sees the keys that lie before position q + 1 + shift.
struct PackedParams : ShiftedParams {  // len_kv: positions of keys
  KeysBefore keys_before;
};
struct PackedSequences : Prefix<PackedSequences, PackedParams> {
  static constexpr char const* kName = "packed";
  static SPARSE_FMHA_HD Params of(bool causal, int32_t len_q, int32_t len_kv, KeysBefore before) {
    return {causal ? DenseOrCausal::of(Causal::Params{len_q, len_kv})
                   : DenseOrCausal::of(Dense::Params{len_q, len_kv}),
            before};
  }
  static SPARSE_FMHA_HD int32_t limit(Params const& p, int32_t q) {
    return p.keys_before(DenseOrCausal::limit(p, q));
  }
};

}  // namespace sparse_fmha
