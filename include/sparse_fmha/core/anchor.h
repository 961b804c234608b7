// The computations by which AnchorAttention (Zhang et al. 2025, arXiv:2505.23520) chooses distant
// keys, as plain data. python/sparse_fmha/patterns/anchor.py defines them.
#pragma once

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

// Queries are in blocks; `step` blocks are a superblock. There are as many keys as queries.
struct AnchorGrid {
  static constexpr int32_t kTile = 64;  // keys; divides every range of keys below

  int32_t length;  // tokens, at most 2^30
  int32_t block;   // 64 or 128 queries
  int32_t step;    // step * block is at most 2048

  SPARSE_FMHA_HD int32_t blocks() const { return ceil_div(length, block); }
  SPARSE_FMHA_HD int32_t superblocks() const { return ceil_div(blocks(), step); }

  // The anchor keys of query block i: the first block of keys, then [near(i), (i + 1) * block), up
  // to each query. The first block is never in both.
  SPARSE_FMHA_HD int32_t near(int32_t i) const { return max_int(1, i / step * step - 1) * block; }
  SPARSE_FMHA_HD int32_t anchor_tiles(int32_t i) const {
    return (block + (i + 1) * block - near(i)) / kTile;
  }
  // First key of the t-th anchor tile.
  SPARSE_FMHA_HD int32_t anchor_tile(int32_t i, int32_t t) const {
    return t * kTile < block ? t * kTile : near(i) + t * kTile - block;
  }

  // The distant keys of superblock u, some of which are kept: `candidates` keys from key `block`
  // on.
  SPARSE_FMHA_HD int32_t candidates(int32_t u) const { return max_int(0, u * step - 2) * block; }
  // Number of 32-bit words with a bit for each candidate of the last superblock.
  SPARSE_FMHA_HD int32_t words() const {
    return length == 0 ? 0 : candidates(superblocks() - 1) / 32;
  }
};

// For each query block, the mean over its queries of the largest score with an anchor key.
struct AnchorMeans {
  AnchorGrid grid;
  DataType dtype;
  int32_t batch;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t head_dim;
  TensorView q;
  TensorView k;
  float scale;
  float* means;  // [B, heads_q, blocks]
};

// The candidates n with q_mean . k_n >= least for some query block of the superblock.
struct AnchorKeys {
  AnchorGrid grid;
  DataType dtype;  // of k
  int32_t batch;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t head_dim;
  TensorView q_mean;  // fp32 [B, blocks, heads_q, D]
  TensorView k;
  float const* least;  // [B, heads_q, blocks]
  uint32_t* bits;      // [B, heads_q, superblocks, words]; bit c % 32 of word c / 32: key block + c
  int32_t* counts;     // [B, heads_q, superblocks]
};

// The indices of the bits set in each list, ascending, then -1.
struct AnchorColumns {
  int64_t lists;
  int32_t words;
  int32_t first;  // index of the lowest bit
  int32_t width;
  uint32_t const* bits;  // [lists, words]
  int32_t* columns;      // [lists, width]
  int32_t* counts;       // [lists]; at most width
};

struct AnchorKernels {
  void (*means)(AnchorMeans const&, ExecutionContext const&);
  void (*keys)(AnchorKeys const&, ExecutionContext const&);
  void (*columns)(AnchorColumns const&, ExecutionContext const&);
};

// Throws std::runtime_error if this build has none for the architecture.
AnchorKernels anchor_kernels(Arch arch);

}  // namespace sparse_fmha
