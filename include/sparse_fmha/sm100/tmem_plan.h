// Which columns of tensor memory hold what, for query tiles of 128 rows. Integer code, for host and
// device. No kernel uses it yet: docs/gpus.md.
//
// Tensor memory has 128 lanes, the rows of a query tile, of 512 columns of four bytes. Per query
// tile:
//
//   scores    fp32, a column for each key
//   weights   16 bits, two keys a column, over the upper half of the scores: the thread of a row
//             has loaded all scores of it before it stores its first weight
//   output    fp32, a column for each element of the head
//
// Head dims up to 128 have room for two query tiles, larger ones for one.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha::sm100 {

inline constexpr int kTmemColumns = 512;
inline constexpr int kTileKeys = 128;  // of a key tile
inline constexpr int kMaxQueryTiles = 2;

struct Columns {
  int first;
  int count;
  SPARSE_FMHA_HD constexpr int end() const { return first + count; }
};
SPARSE_FMHA_HD constexpr bool overlap(Columns const& a, Columns const& b) {
  return a.first < b.end() && b.first < a.end();
}

// The columns of one query tile.
struct TilePlan {
  Columns scores;
  Columns weights;
  Columns output;
};

struct TmemPlan {
  int query_tiles;
  int allocated;  // columns: a power of two of at least 32
  TilePlan tiles[kMaxQueryTiles];
};

// Scores of all query tiles first, then outputs.
SPARSE_FMHA_HD constexpr TmemPlan tmem_plan(int head_dim) {
  TmemPlan plan{head_dim <= 128 ? 2 : 1, 32, {}};
  int const scores = plan.query_tiles * kTileKeys;
  for (int q = 0; q < plan.query_tiles; ++q) {
    int const first = q * kTileKeys;
    plan.tiles[q] = {{first, kTileKeys},
                     {first + kTileKeys / 2, kTileKeys / 2},
                     {scores + q * head_dim, head_dim}};
  }
  while (plan.allocated < scores + plan.query_tiles * head_dim) {
    plan.allocated *= 2;
  }
  return plan;
}

// What happens to the columns of a query tile for a key tile, in this order.
enum class Event : int {
  kScores,   // a product writes scores
  kLoad,     // the softmax has loaded a row's scores into registers
  kStore,    // it stores weights
  kRescale,  // the correction reads and writes output
  kValues,   // a product reads weights, and reads and writes output
  kEvents
};

// The events from which to which, both included, what is in columns must not be written by others.
struct Lifetime {
  Event from;
  Event to;
};
inline constexpr Lifetime kScoresLive = {Event::kScores, Event::kLoad};
inline constexpr Lifetime kWeightsLive = {Event::kStore, Event::kValues};
// The output lives from the first key tile to the last.
inline constexpr Lifetime kOutputLives = {Event::kScores, Event::kValues};

SPARSE_FMHA_HD constexpr bool live_at_once(Lifetime const& a, Lifetime const& b) {
  return a.from <= b.to && b.from <= a.to;
}

}  // namespace sparse_fmha::sm100
