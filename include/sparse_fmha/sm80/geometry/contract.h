// The interface of a geometry of the family sm80, which knows where the tokens of a tile lie.
//
// It is a class template over the kernel's Traits and the Mechanism, as Hopper's are. Each thread
// holds one object, made of the kernel's parameters and of `Shared`:
//
//   struct Params;                    what the launch fills in
//   struct Shared;                    what it keeps in shared memory
//   struct Work;                      a query tile, in registers
//   Work begin(WorkTile)              by all threads, which may synchronize
//   queries(Work, view)               query rows for copy_tile(), of a tensor that has q's shape
//   out_row(Work, r)                  its index in [B, Lq, Hq], or a negative number
//   static launch(problem, context)   on the host
//
// The key tiles, in the order of the walk:
//
//   tiles(Work)                       their number
//   place(Work, i)                    by all threads: writes where tile i lies. Called for
//                                     i = 0, 1, ..., also beyond the last one
//   keys(Work, i), values(Work, i)    rows for copy_tile()
//   write_mask(Work, i)               by all threads: writes the mask of tile i
//   needs(Work, i, group)             whether a group of 64 rows sees any of it; false only if not
//   is_masked(Work, i)                whether any row may not see all of it
//
// Between place(i) and the calls for tile i all threads synchronize, and again between
// write_mask(i) and the look-up of the mask. While tile i is computed, tile i + 1 is copied and
// masked, and i + 2 is placed: what place() writes must last for three tiles, what write_mask()
// writes for two.
//
//   class Mask                        Mask(geometry, Work, row), where `row` is the first of a
//                                     thread's two rows; look_up(i) -> Seen, and sees(Seen, j) for
//                                     the j-th score of a thread. Seen::pass_over(n) drops the
//                                     first n columns, a multiple of 16.
#pragma once

#include <cstdint>

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha::sm80 {

using namespace device;

// The columns of a tile that each of a thread's two rows sees: a bit for each of the thread's
// columns, in their order.
struct SeenColumns {
  uint32_t bits[kRowsPerThread];
  __device__ __forceinline__ bool sees(int i) const {
    return bits[AccumulatorPosition::row_of(i)] >> (i / 4 * 2 + i % 2) & 1;
  }
  __device__ __forceinline__ void pass_over(int columns) {
    bits[0] >>= columns / 4;
    bits[1] >>= columns / 4;
  }
};

}  // namespace sparse_fmha::sm80
