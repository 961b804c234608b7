// Which key blocks a group of query rows keeps, by the bits of the key tiles that it skipped.
// Integer arithmetic, shared by the kernel (device/kept_tiles.h) and the host tests.
#pragma once

#include "sparse_fmha/planning/list_stages.h"

namespace sparse_fmha {

// The 32 blocks of a word, lowest first. p: lists of these blocks, of groups of block_q rows.
// skipped: the group's bits. A tile without a bit is kept if the group visits it, which is as far
// as its last row sees keys.
SPARSE_FMHA_HD uint32_t kept_blocks(BlockSparse::Params const& p, uint32_t const* skipped,
                                    int32_t blocks_per_tile, int32_t group, int32_t word) {
  int32_t const last_query = min_int((group + 1) * p.block_q, p.len_q) - 1;
  int32_t const visited = ceil_div(BlockSparse::limit(p, last_query), p.block_kv);
  int32_t const first = 32 * word;
  int32_t const end = min_int(first + 32, visited);
  uint32_t kept = 0;
  for (int32_t block = first; block < end;) {
    int32_t const tile = block / blocks_per_tile;
    int32_t const next = min_int((tile + 1) * blocks_per_tile, end);
    bool const keeps = (skipped[tile / 32] >> tile % 32 & 1) == 0;
    kept |= keeps ? first_columns(next - first) & ~first_columns(block - first) : 0;
    block = next;
  }
  return kept;
}

}  // namespace sparse_fmha
