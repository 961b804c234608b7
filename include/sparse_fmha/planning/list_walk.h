// The order of a query tile's stages when its two consumers have separate lists.
//
// First the stages for both, then alternately one for the first consumer and one for the second,
// then the rest of the longer list. A consumer passes over the other's stages.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha {

// Stages of each stream of a query tile: for both consumers, for the first, for the second.
struct StreamStages {
  int32_t both;
  int32_t first;
  int32_t second;
  SPARSE_FMHA_HD int32_t total() const { return both + first + second; }
};

// The i-th stage of a query tile is the index-th of a stream.
struct StreamPlace {
  int32_t stream;
  int32_t index;
};

SPARSE_FMHA_HD StreamPlace stream_place(StreamStages const& stages, int32_t i) {
  int32_t const rest = i - stages.both;
  int32_t const paired = min_int(stages.first, stages.second);
  if (rest < 0) {
    return {0, i};
  }
  if (rest < 2 * paired) {
    return {1 + rest % 2, rest / 2};
  }
  return {stages.first > paired ? 1 : 2, rest - paired};
}

// The stages [begin, end) of a stream that every row sees entirely.
struct WholeStages {
  int32_t begin;
  int32_t end;
};

// The stages of one consumer.
struct ListWalk {
  static constexpr int32_t num_partial = 0;  // is_masked() tells which ones are
  int32_t num_full;
  WholeStages whole;
  int32_t both;
  int32_t others;  // stages for the other consumer alone
  int32_t consumer;

  SPARSE_FMHA_HD bool is_masked(int32_t i) const { return i < whole.begin || i >= whole.end; }
  // Index of the consumer's i-th stage among all stages of the query tile.
  SPARSE_FMHA_HD int32_t position(int32_t i) const {
    return i < both ? i : i + min_int(i - both + consumer, others);
  }
  // Whether a stage of the other consumer comes right before the i-th; there are never two.
  SPARSE_FMHA_HD bool follows_other(int32_t i) const {
    int32_t const turn = i - both + consumer;  // number of the other's stages that came before
    return i >= both && turn > 0 && turn <= others;
  }
};

// `whole`: of the stages for both, and of the consumer's own. Stages between masked stages may
// count as masked, too.
SPARSE_FMHA_HD ListWalk list_walk(StreamStages const& stages, WholeStages both, WholeStages own,
                                  int32_t consumer) {
  int32_t const num_own = consumer == 0 ? stages.first : stages.second;
  int32_t const others = consumer == 0 ? stages.second : stages.first;
  WholeStages whole = both;
  if (num_own > 0) {
    bool const joined = both.end == stages.both && own.begin == 0;
    whole = {joined ? both.begin : stages.both + own.begin, stages.both + own.end};
  }
  return {stages.both + num_own, whole, stages.both, others, consumer};
}

}  // namespace sparse_fmha
