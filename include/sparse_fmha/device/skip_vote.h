// The vote of a warpgroup to skip a key tile whose weights are negligible (BLASST,
// arXiv:2512.12087), before the running maximum is updated.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/cute.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha::device {

// For kernels that skip key tiles.
struct SkipParams {
  float const* threshold;      // [B]
  unsigned long long* counts;  // [B, Hq, 2]: tiles visited, and tiles skipped
  int32_t heads_q;
  int32_t groups = 0;        // of 64 query rows
  int32_t words = 0;         // of a group's bits
  uint32_t* bits = nullptr;  // [B, Hq, groups, words], zeros, or nullptr: of skipped tiles
};

// The bits of 32 key tiles, of those that a group of 64 query rows skips: gathered in a register
// and stored together. All threads of a warpgroup call these.
class SkippedTiles {
 public:
  __device__ __forceinline__ void note(int key_tile) { bits_ |= 1u << key_tile % 32; }
  // Stores the word with this tile and begins the next. A consumer whose rows do not exist may walk
  // along with the other one.
  __device__ __forceinline__ void store(SkipParams const& skip, WorkTile const& tile, int group,
                                        int key_tile) {
    if (skip.bits != nullptr && bits_ != 0 && threadIdx.x % 128 == 0 && group < skip.groups) {
      // Fewer than 2^31 groups, or out would not fit into memory.
      int const row = (tile.batch * skip.heads_q + tile.head) * skip.groups + group;
      skip.bits[int64_t(row) * skip.words + key_tile / 32] = bits_;
    }
    bits_ = 0;
  }

 private:
  uint32_t bits_ = 0;
};

// Whether any thread of a warpgroup votes yes. Called by all 128 threads.
__device__ __forceinline__ bool any_of_warpgroup(bool mine, int warpgroup) {
  constexpr int kFirstBarrier = 1;  // hardware numbering; CUTLASS's barriers start at 8
  uint32_t any;
  asm volatile(
      "{\n"
      "  .reg .pred mine, any;\n"
      "  setp.ne.u32 mine, %1, 0;\n"
      "  barrier.cta.red.or.pred any, %2, 128, mine;\n"
      "  selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(uint32_t(mine)), "r"(kFirstBarrier + warpgroup)
      : "memory");
  // A warp vote tells the compiler that the result is uniform, so it keeps uniform registers after
  // the branch.
  return __any_sync(0xffffffff, any != 0) != 0;
}

// For kernels that do not skip.
struct NoVote {
  template <class... Args>
  __device__ __forceinline__ explicit NoVote(Args const&...) {}
};

// The votes of one query tile.
class TileVote {
 public:
  // exists(r): whether the thread's r-th row exists. A row that does not never vetoes a skip,
  // because no tile comes near its maximum.
  template <class Exists>
  __device__ __forceinline__ TileVote(SkipParams const& skip, WorkTile const& tile,
                                      float scale_log2, int warpgroup, Exists exists)
      : warpgroup_(warpgroup) {
    constexpr float kBelowOne = 1.f - 0x1p-24f;
    float const threshold = fminf(fmaxf(skip.threshold[tile.batch], 0.f), kBelowOne);  // NaN: 0
    margin_ = log2f(threshold) / scale_log2;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      top_[r] = exists(r) ? -INFINITY : INFINITY;
    }
  }

  // Takes the largest scores that the thread has of a tile's rows; returns true if the tile is
  // skipped: the barrier compares those of other threads. kMasked: the tile may have no key that a
  // row sees.
  template <bool kMasked>
  __device__ __forceinline__ bool leaves_out(float const (&high)[kRowsPerThread]) {
    bool counts = false;
    bool sees = false;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      // A row that has seen no key keeps any score but -inf. Every row keeps NaN.
      counts |= !(high[r] < fmaxf(top_[r] + margin_, -kLargest)) && top_[r] != INFINITY;
      sees |= kMasked && high[r] > -INFINITY && top_[r] != INFINITY;
    }
    bool const kept = any_of_warpgroup(counts, warpgroup_);
    bool const visited = kept || !kMasked || any_of_warpgroup(sees, warpgroup_);
    visited_ += visited;
    skipped_ += visited && !kept;
    return !kept;
  }

  // Takes the largest scores of the rows of a tile that is kept. Those of one that is skipped are
  // below the largest so far.
  __device__ __forceinline__ void keep(float const (&high)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      top_[r] = fmaxf(top_[r], high[r]);
    }
  }

  // Adds the counts to [B, Hq, 2]. The thread that does has the first row: without it there is
  // none, and the group visited nothing.
  __device__ __forceinline__ void add_to(SkipParams const& skip, WorkTile const& tile) const {
    if (threadIdx.x % 128 == 0 && top_[0] != INFINITY) {
      auto* const counts = skip.counts + (int64_t(tile.batch) * skip.heads_q + tile.head) * 2;
      atomicAdd(counts, static_cast<unsigned long long>(visited_));
      atomicAdd(counts + 1, static_cast<unsigned long long>(skipped_));
    }
  }

 private:
  static constexpr float kLargest = 3.402823466e38f;
  int const warpgroup_;
  float margin_;               // ln(threshold), in raw scores
  float top_[kRowsPerThread];  // the largest score so far
  int visited_ = 0;            // tiles in which some row sees a key
  int skipped_ = 0;
};

}  // namespace sparse_fmha::device
