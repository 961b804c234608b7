// The query tiles of packed sequences, found on the device before the kernel runs.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse_fmha/core/packed.h"
#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/packed_pages.h"
#include "sparse_fmha/mechanisms/packed.h"

namespace sparse_fmha::device {

// One query tile: rows of a sequence, or tokens of no sequence, which see no keys.
struct alignas(16) PackedTile {
  int32_t row;      // the first one, in the sequence
  int32_t q_begin;  // token of the sequence's first query
  int32_t q_len;
  int32_t k_begin;   // token of its first key
  int32_t k_len;     // positions of keys in use
  int32_t k_rows;    // keys in use that exist
  int32_t sequence;  // row of pages_before
  int32_t unused;
};

struct PackedPlan {
  PackedTile const* tiles;      // by sequence and weight, the lightest first
  int32_t const* count;         // their number
  int32_t most;                 // at most so many
  int32_t const* pages_before;  // [sequences, page_stride]; nullptr: keys are not in pages
  int32_t page_stride;
};

// Launches the kernels that find the tiles of tile_q rows and copy pages. The result is in the
// context's memory.
PackedPlan plan_packed(FmhaProblem const& problem, int32_t tile_q, ExecutionContext const& context,
                       PackedKeys& keys);

}  // namespace sparse_fmha::device
