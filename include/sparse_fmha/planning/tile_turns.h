// Which tiles a thread block takes if their order is known at launch: integer arithmetic for host
// and device.
#pragma once

#include <cstdint>

#include "sparse_fmha/core/config.h"

namespace sparse_fmha {

// The tile that a thread block takes after tile `index`. Each of the `blocks` takes one tile of
// each round, in one direction in even rounds and in the other in odd ones. So whoever had the
// heaviest tile of a round gets the lightest of the next. Without a counter nothing is allocated or
// cleared.
SPARSE_FMHA_HD int32_t next_in_turns(int32_t index, int32_t blocks) {
  int32_t const round = index / blocks;
  int32_t const place = index - round * blocks;
  return (round + 1) * blocks + (blocks - 1 - place);
}

// Waves of tiles up to which thread blocks take turns. Beyond, a counter balances better what tiles
// take, and the memset that clears it does not show.
constexpr int32_t kWavesInTurns = 16;

// Whether turns balance query tiles of `q_tiles` a head: if they weigh the same or nearly so, or if
// they come in order of weight, which is so if all heads are side by side.
inline bool turns_balance(bool causal, int32_t q_tiles, bool all_heads) {
  return !causal || q_tiles <= 2 || all_heads;
}

}  // namespace sparse_fmha
