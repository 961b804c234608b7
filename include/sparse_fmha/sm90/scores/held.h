// Which operand a thread block holds: the pairs of tiles that it multiplies, and their mask.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/scores/storage.h"

namespace sparse_fmha::sm90 {

// Queries are held and keys streamed. Partial tiles come last.
template <int kRows>
struct QueriesHeld {
  static constexpr bool kQueries = true;

  // The scheduler hands out the highest tiles first, which under a causal mask see the most.
  static __device__ __forceinline__ int32_t tile(ScoreParams const& p, int32_t scheduled) {
    return scheduled / p.parts;
  }
  static __device__ __forceinline__ int32_t held_head(ScoreParams const& /*p*/, int32_t head) {
    return head;
  }
  static __device__ __forceinline__ int32_t streamed_head(ScoreParams const& p, int32_t head) {
    return head / p.heads_per_kv;
  }
  static __device__ __forceinline__ bool has_row(ScoreParams const& p, ScoreWork const& work,
                                                 int32_t row) {
    return work.held * kRows + row < p.len_q;
  }
  // Each part has as many tiles.
  static __device__ __forceinline__ void find_range(ScoreParams const& p, ScoreWork& work) {
    int32_t const seen = min(p.len_kv, (work.held + 1) * kRows + p.shift);
    int32_t const tiles = (max(seen, 0) + kScoreTile - 1) / kScoreTile;
    int32_t const width = (tiles + p.parts - 1) / p.parts;
    work.begin = min(work.part * width, tiles);
    work.end = min(work.begin + width, tiles);
  }
  static __device__ __forceinline__ bool is_masked(ScoreParams const& p, ScoreWork const& work,
                                                   int32_t tile) {
    int32_t const all_see = min(p.len_kv, work.held * kRows + p.shift + 1);
    return (tile + 1) * kScoreTile > all_see;
  }

  // Of a thread and a tile: the last columns that its rows see.
  int32_t last[kRowsPerThread];
  __device__ __forceinline__ QueriesHeld(ScoreParams const& p, ScoreWork const& work, int32_t row,
                                         int32_t tile) {
    int32_t const first = tile * kScoreTile + AccumulatorPosition{}.column;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const query = work.held * kRows + row + 8 * r;
      last[r] = min(query + p.shift, p.len_kv - 1) - first;
    }
  }
  __device__ __forceinline__ bool sees(int i) const {
    return AccumulatorPosition::column_of(i) <= last[AccumulatorPosition::row_of(i)];
  }
};

// Keys are held and queries streamed. Partial tiles come first. Queries and keys behind the last
// have no mask: the former have infinite terms, and the results of the latter are not stored.
template <int kRows>
struct KeysHeld {
  static constexpr bool kQueries = false;

  // The lowest keys are seen by the most queries.
  static __device__ __forceinline__ int32_t tile(ScoreParams const& p, int32_t scheduled) {
    return p.scheduler.q_tiles - 1 - scheduled;
  }
  static __device__ __forceinline__ int32_t held_head(ScoreParams const& p, int32_t head) {
    return head / p.heads_per_kv;
  }
  static __device__ __forceinline__ int32_t streamed_head(ScoreParams const& /*p*/, int32_t head) {
    return head;
  }
  static __device__ __forceinline__ bool has_row(ScoreParams const& p, ScoreWork const& work,
                                                 int32_t row) {
    return work.held * kRows + row < p.len_kv;
  }
  static __device__ __forceinline__ void find_range(ScoreParams const& p, ScoreWork& work) {
    int32_t const tiles = (p.len_q + kScoreTile - 1) / kScoreTile;
    work.begin = min(max(work.held * kRows - p.shift, 0) / kScoreTile, tiles);
    work.end = tiles;
  }
  static __device__ __forceinline__ bool is_masked(ScoreParams const& p, ScoreWork const& work,
                                                   int32_t tile) {
    return tile * kScoreTile + p.shift < (work.held + 1) * kRows - 1;
  }

  // Of a thread and a tile: the first columns that see its rows.
  int32_t first[kRowsPerThread];
  __device__ __forceinline__ KeysHeld(ScoreParams const& p, ScoreWork const& work, int32_t row,
                                      int32_t tile) {
    int32_t const begin = tile * kScoreTile + AccumulatorPosition{}.column;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      first[r] = work.held * kRows + row + 8 * r - p.shift - begin;
    }
  }
  __device__ __forceinline__ bool sees(int i) const {
    return AccumulatorPosition::column_of(i) >= first[AccumulatorPosition::row_of(i)];
  }
};

}  // namespace sparse_fmha::sm90
