// Groups of neighboring query blocks of 64 rows that walk one merged list of key blocks of 64 keys.
// Integer arithmetic, shared by the device and the host tests.
//
// An entry of the merged list says which members of the group see the key block. The sets of
// members are spread evenly over the list, so that each member has work all along it: where a
// member waits, the ring of stages fills with what it has not read.
#pragma once

#include "sparse_fmha/core/config.h"

namespace sparse_fmha {

struct ListGroup {
  static constexpr int32_t kMembers = 3;           // query blocks
  static constexpr int32_t kSets = 1 << kMembers;  // of members; the first is empty
  static constexpr int32_t kBlock = 64;            // rows of a query block, keys of an entry
  // More key blocks would overflow spread_place().
  static constexpr int32_t kMaxKeyBlocks = (1 << 15) - 1;
};

// A key block, and a bit for each member that sees it.
struct GroupEntry {
  int32_t word;

  static constexpr int32_t kShift = 24;
  static SPARSE_FMHA_HD GroupEntry of(int32_t block, int32_t members) {
    return {block | members << kShift};
  }
  SPARSE_FMHA_HD int32_t block() const { return word & ((1 << kShift) - 1); }
  SPARSE_FMHA_HD int32_t members() const { return word >> kShift; }
};

// The place in the merged list of the rank-th key block of the set `own`. counts: of each set. The
// r-th of n lies at (2r + 1) / 2n of the list; of equal ones the lower set is first.
SPARSE_FMHA_HD int32_t spread_place(int32_t const (&counts)[ListGroup::kSets], int32_t own,
                                    int32_t rank) {
  uint32_t place = static_cast<uint32_t>(rank);
  for (int32_t other = 1; other < ListGroup::kSets; ++other) {
    if (other != own && counts[other] > 0) {
      // The s-th of the other set is before this one if 2s + 1 <= last.
      uint32_t const scaled =
          (2 * static_cast<uint32_t>(rank) + 1) * static_cast<uint32_t>(counts[other]);
      uint32_t const last =
          (other < own ? scaled : scaled - 1) / static_cast<uint32_t>(counts[own]);
      place += (last + 1) / 2;
    }
  }
  return static_cast<int32_t>(place);
}

}  // namespace sparse_fmha
