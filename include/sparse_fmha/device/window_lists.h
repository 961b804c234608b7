// Lists of the key blocks that groups of 64 query rows of a neighborhood kept, with bitmasks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparse_fmha/planning/kept_windows.h"

namespace sparse_fmha::device {

// Of one interleaved grid. Device memory; a list is a batch entry and a head.
struct WindowLists {
  InterleavedGrid grid;
  int32_t first_key;  // of the grid, among all keys
  int32_t extra_key;  // the first extra token
  int32_t extra_len;
  int32_t tile_k;
  int32_t all_groups;
  int32_t lists;
  uint32_t const* skipped;  // [lists, all_groups, skip_words]
  int32_t skip_words;
  int32_t width;
  uint32_t* keys;        // [lists, all_groups, width], zeros: kept keys of the group's own boxes
  int32_t* full_counts;  // [lists, all_groups]
  int32_t* full;         // [lists, all_groups, width]: blocks that all rows see whole
  int32_t* counts;       // the same of blocks with bitmasks
  int32_t* indices;
  uint32_t* bits;  // [lists, all_groups, width, 64]
};

// Fills the lists of the grid's groups.
void list_windows(WindowLists const& lists, cudaStream_t stream);

// The tokens of the grid's query rows, in the order of groups, and of its keys; -1: none. Both
// begin at the grid's own.
void find_tokens(InterleavedGrid const& grid, Coord const& whole, int32_t* rows, int32_t* keys,
                 cudaStream_t stream);

}  // namespace sparse_fmha::device
