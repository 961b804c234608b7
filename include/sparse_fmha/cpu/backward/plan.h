// How a backward pass is divided into items, decided before the work begins.
#pragma once

#include <cstddef>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha::cpu {

// For each block of keys, the query blocks that list it, in ascending order.
struct TransposedLists {
  struct Entry {
    int32_t block;  // of queries
    int32_t place;  // index in the partial list, from 1; 0: in the full list
  };
  int64_t const* offsets = nullptr;  // [lists, blocks of keys + 1]
  Entry const* entries = nullptr;
  // Stride of a batch entry's or head's offsets; 0 if they are shared.
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

// Which tiles the forward pass skipped: a byte for each visit of each group of rows (groups.h), in
// order. Gradients::skipped_tiles holds it.
struct SkippedTiles {
  int64_t const* offsets = nullptr;  // of each (batch entry, query head, group)
  uint8_t* bytes = nullptr;

  uint8_t* of(int64_t group) const { return bytes + offsets[group]; }
};

struct BackwardPlan {
  TileShape by_query;  // of the walks that sum gradients of queries
  int32_t query_tiles;
  TileShape by_key;     // of the transposed walks, for keys and extra tokens
  int32_t extra_tiles;  // these come before the key tiles
  int32_t key_tiles;
  TransposedLists lists;  // of key blocks
  int32_t run_keys;       // keys in a key tile of stripes, of which by_key.k are taken at a time;
                          // the same of any mechanism if tiles are skipped
  // Per query, [B, grid_q, heads_q] in the compute type, in the memory of Gradients::row_terms.
  void* lse;             // in log2 units; inf if the query sees no key
  void* delta;           // sum(out * gradient of out) - gradient of lse
  SkippedTiles skipped;  // if tiles are skipped
};

// One kind of items, with functions as in isa.h.
struct BackwardStage {
  size_t (*scratch_bytes)(FmhaProblem const&, BackwardPlan const&);
  void (*run)(FmhaProblem const&, void const* params, BackwardPlan const&, int64_t item,
              void* scratch);
};

struct BackwardStages {
  BackwardStage row_terms;  // lse, delta and the skipped tiles; items as `queries`
  BackwardStage queries;    // item = (batch * heads_q + head) * query tiles + tile
  BackwardStage keys;       // item = (batch * heads_kv + head) * (extra + key tiles) + tile
};

}  // namespace sparse_fmha::cpu
