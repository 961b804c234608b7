// Key tiles that a warpgroup leaves out of its softmax because they are too small to count (BLASST,
// arXiv:2512.12087): a vote before the running maximum is updated.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/cute.h"
#include "sparse_fmha/device/scheduler.h"

namespace sparse_fmha::device {

// For kernels that leave key tiles out.
struct SkipParams {
  float const* threshold;      // [B]
  unsigned long long* counts;  // [B, Hq, 2]: tiles visited, and those of them left out
  int32_t heads_q;
};

// Whether any thread of a warpgroup says yes; all 128 call this.
__device__ __forceinline__ bool any_of_warpgroup(bool mine, int warpgroup) {
  constexpr int kFirstBarrier = 1;  // as the hardware counts; CUTLASS's begin at 8
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
  // The compiler knows of a vote that a warp agrees on it, and keeps uniform registers for what
  // comes behind the branch.
  return __any_sync(0xffffffff, any != 0) != 0;
}

// For kernels that leave nothing out.
struct NoVote {
  template <class... Args>
  __device__ __forceinline__ explicit NoVote(Args const&...) {}
};

// The votes of one query tile.
class TileVote {
 public:
  // exists(r): whether the thread's r-th row does. Those that do not vote for leaving out: no tile
  // comes near their maximum.
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

  // Takes the largest scores of a tile's rows; true if the tile is left out. kMasked: there may be
  // no key in it that a row sees.
  template <bool kMasked>
  __device__ __forceinline__ bool leaves_out(float const (&high)[kRowsPerThread]) {
    bool counts = false;
    bool sees = false;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      // A row that has seen nothing keeps any score but -inf, and every row what is no number.
      counts |= !(high[r] < fmaxf(top_[r] + margin_, -kLargest)) && top_[r] != INFINITY;
      sees |= kMasked && high[r] > -INFINITY && top_[r] != INFINITY;
      top_[r] = fmaxf(top_[r], high[r]);
    }
    bool const kept = any_of_warpgroup(counts, warpgroup_);
    bool const visited = kept || !kMasked || any_of_warpgroup(sees, warpgroup_);
    visited_ += visited;
    skipped_ += visited && !kept;
    return !kept;
  }

  // Adds what was counted to [B, Hq, 2].
  __device__ __forceinline__ void add_to(SkipParams const& skip, WorkTile const& tile) const {
    if (threadIdx.x % 128 == 0) {
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
  int visited_ = 0;            // tiles of which some row sees a key
  int skipped_ = 0;
};

}  // namespace sparse_fmha::device
