// Sequences that share one dimension of tokens, for kernels that take them all in one launch.
#pragma once

#include <cstdint>

namespace sparse_fmha {

// Where the pages of each sequence are. A page that does not exist has no keys.
struct PageTable {
  int32_t const* entries = nullptr;  // [sequences, width]; nullptr: keys are not in pages
  int64_t row_stride = 0;            // entries from one sequence to the next
  int32_t width = 0;
  int32_t pages = 0;      // that exist
  int32_t page_size = 0;  // keys of a page
};

// Addresses are of device memory. A start is clamped to the tokens that exist, and one below an
// earlier one counts as that one.
struct PackedTokens {
  int32_t const* cu_q = nullptr;    // [sequences + 1]
  int32_t const* cu_k = nullptr;    // [sequences + 1]; may be nullptr with pages and used_k
  int32_t const* used_k = nullptr;  // [sequences], keys in use; nullptr: all
  int32_t sequences = 0;
  PageTable table;  // k and v are then [pages, page_size, heads_kv, D]
};

}  // namespace sparse_fmha
