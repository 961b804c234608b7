// Online softmax over the accumulator of one warpgroup, in log2 units.
//
// Each row has a reference, near its largest score, and the sum of its weights so far, which are
// exp2(scale * (score - reference)). How the scores of a key tile become weights:
//
//   the maximum first                          against the current reference
//
//          scores                                          scores
//            | share_tops(), or in update()                    | weigh(): weights and their sum
//            v                                               v
//         maximum                                 sum <= 2^10, and no key is
//            | update()                           the row's first?
//            v                                        | yes                | no
//    more than 8 above                                |                    | settle()
//    the reference?                                   |                    v
//      | yes        | no                              |         sum within what weights hold?
//      v            |                                 |           | yes                 | no
//   reference       |                                 |           v                     v
//   = maximum,      |                                 |     reference          scores once more
//   rescale         |                                 |     += log2(sum),      (again()), then
//      |            |                                 |     rescale            the left side
//      v            v                                 v           |
//   weights, sum += theirs                   take(): sum +=       v
//                                                       weights and sum scaled, sum +=
//
// If `rescale` is not 1, the output so far is multiplied by it. References move row by row, but on
// the right side one row that answers no sends its whole warp that way. A row that has seen no key
// is open: its reference is -inf and counts as zero. weigh_known() takes the right side when the
// maximum is known, so it never needs the scores again: if the maximum is too large it takes the
// left side. finish() ends a row.
#pragma once

#include "sparse_fmha/device/accumulator.h"

namespace sparse_fmha::device {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct OnlineSoftmax {
  // The reference follows the maximum only if it is this far behind, in log2 units. The output is
  // then rarely rescaled, and a weight is at most 2^8. The result does not depend on it.
  static constexpr float kSlack = 8.f;

  float const scale_log2;
  float row_max[kRowsPerThread];  // the reference, in raw scores; near the maximum
  float row_sum[kRowsPerThread];  // this thread's share

  __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale_log2(scale) {
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0.f;
    }
  }

  // The largest score of each row that the thread has.
  template <class Scores>
  static __device__ __forceinline__ void own_tops(Scores const& s, float (&high)[kRowsPerThread]) {
    fold_rows(s, high, larger);
  }
  // The largest score of each row, from those of its four threads. In two halves, so that a vote
  // waits under the first exchange.
  static __device__ __forceinline__ void begin_sharing(float const (&high)[kRowsPerThread],
                                                       float (&theirs)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      theirs[r] = __shfl_xor_sync(0xffffffff, high[r], 2);
    }
  }
  static __device__ __forceinline__ void finish_sharing(float (&high)[kRowsPerThread],
                                                        float const (&theirs)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      high[r] = larger(high[r], theirs[r]);
      high[r] = larger(high[r], __shfl_xor_sync(0xffffffff, high[r], 1));
    }
  }
  static __device__ __forceinline__ void share_tops(float (&high)[kRowsPerThread]) {
    float theirs[kRowsPerThread];
    begin_sharing(high, theirs);
    finish_sharing(high, theirs);
  }

  // Replaces the scores by exp2(scale * (s - reference)). Returns whether the output so far must
  // first be multiplied by `rescale`. kMasked: a row may not have seen any key yet.
  template <bool kMasked, class Scores>
  __device__ __forceinline__ bool update(Scores& s, float (&rescale)[kRowsPerThread]) {
    float part[kRowsPerThread];
    fold_rows(s, part, larger);
    return follow<kMasked>(s, [&](int r) { return reduce_quad(part[r], larger); }, rescale);
  }
  // The same after share_tops().
  template <bool kMasked, class Scores>
  __device__ __forceinline__ bool update(Scores& s, float const (&high)[kRowsPerThread],
                                         float (&rescale)[kRowsPerThread]) {
    return follow<kMasked>(s, [&](int r) { return high[r]; }, rescale);
  }
  // Like update(), but against the current reference: the maximum is neither computed nor waited
  // for. Weights may be out of range, which their sum shows. The reference of a row that has seen
  // no key is zero (kOpen) or -inf. Returns true if take() must follow, otherwise settle(). `hide`:
  // what is still to be hidden, as in hide_scores(). `sees(r)`: whether the thread sees a score of
  // row r. `meanwhile` is called when most of the work is done.
  template <bool kOpen, class Scores, class Hide, class Sees, class Meanwhile>
  __device__ __forceinline__ bool weigh(Scores& s, float (&sum)[kRowsPerThread], Hide hide,
                                        Sees sees, Meanwhile meanwhile) const {
    bool const opens = kOpen && ((is_open(0) & sees(0)) | (is_open(1) & sees(1)));
    exponentiate_in_order<kOpen>(s, sum, hide, meanwhile);
    return !__any_sync(0xffffffff, opens | (fmaxf(sum[0], sum[1]) > kLargestSum));
  }
  __device__ __forceinline__ void take(float const (&sum)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_sum[r] += sum[r];
    }
  }
  // Makes a sum that is too large, or the first of its row, the row's new reference. Weights that
  // may have been out of range are recomputed from the scores that `again` restores.
  template <class Scores, class Hide, class Sees, class Again>
  __device__ __forceinline__ void settle(Scores& s, float (&sum)[kRowsPerThread],
                                         float (&rescale)[kRowsPerThread], Hide hide, Sees sees,
                                         Again again) {
    constexpr float kRange = 0x1p120f;
    bool is_lost = false;
    float total[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      total[r] = reduce_quad(sum[r], [](float a, float b) { return a + b; });
      is_lost |= total[r] > kRange || (is_open(r) && sees(r) && total[r] < 1.f / kRange);
    }
    if (__any_sync(0xffffffff, is_lost)) {
      again();
      hide_scores(s, hide);
      update<true>(s, rescale);
      return;
    }
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      rescale[r] = 1.f;
      if (total[r] > (is_open(r) ? 0.f : kLargestSum)) {
        float const ahead = __log2f(total[r]);
        row_max[r] = (is_open(r) ? 0.f : row_max[r]) + ahead / scale_log2;
        rescale[r] = exp2_approx(-ahead);
      }
      row_sum[r] = (row_sum[r] + sum[r]) * rescale[r];
    }
    rescale_rows(s, rescale);
  }
  // weigh() and its take() or settle(), after share_tops().
  template <class Scores>
  __device__ __forceinline__ bool weigh_known(Scores& s, float const (&high)[kRowsPerThread],
                                              float (&rescale)[kRowsPerThread]) {
    constexpr float kMost = 100.f;  // log2 of a weight that is surely in settle()'s range
    float const ahead = fmaxf(high[0] - row_max[0], high[1] - row_max[1]) * scale_log2;
    if (__any_sync(0xffffffff, !(ahead <= kMost))) {
      return update<true>(s, high, rescale);
    }
    auto const none = [](auto) { return false; };  // no row is open here
    float sum[kRowsPerThread];
    if (weigh<false>(s, sum, HideNone{}, none, [](float) {})) {
      take(sum);
      return false;
    }
    settle(s, sum, rescale, HideNone{}, none, [] {});
    return true;
  }
  // Completes the sums. Afterwards `rescale` normalizes the output and `lse` is the row's natural
  // log-sum-exp. A row without keys has zero and -inf.
  __device__ __forceinline__ void finish(float (&rescale)[kRowsPerThread],
                                         float (&lse)[kRowsPerThread]) {
    constexpr float kLn2 = 0.69314718055994530942f;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      float const sum = reduce_quad(row_sum[r], [](float a, float b) { return a + b; });
      bool const empty = sum == 0.f;
      rescale[r] = empty ? 0.f : __fdividef(1.f, sum);
      lse[r] = empty ? -INFINITY : (row_max[r] * scale_log2 + __log2f(sum)) * kLn2;
    }
  }

 private:
  static constexpr float kLargestSum = 1024.f;

  // Whether a row has not seen any key yet.
  __device__ __forceinline__ bool is_open(int r) const { return row_max[r] == -INFINITY; }

  static __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

  // Replaces scores by exp2(scale * s - offset) and adds them up.
  template <class Scores, class OffsetOf>
  __device__ __forceinline__ void exponentiate(Scores& s, float (&sum)[kRowsPerThread],
                                               OffsetOf offset_of) const {
    float const offset[kRowsPerThread] = {offset_of(0), offset_of(1)};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(s); ++i) {
      s(i) = exp2_approx(fmaf(s(i), scale_log2, -offset[AccumulatorPosition::row_of(i)]));
    }
    fold_rows(s, sum, [](float a, float b) { return a + b; });
  }

  // Replaces scores by exp2(scale * (s - reference)), masked by `hide`, and adds them up, one group
  // at a time. ptxas would put nearly all multiply-adds and masks before the exponentials, which
  // take long enough to overlap them. So a false dependence makes each group's scale wait for the
  // sums of the group before the last: it takes their sign bit, which a sum of exponentials never
  // has. A group has one score of each chain of fold_rows(), so the sums are the same as there.
  template <bool kOpen, class Scores, class Hide, class Meanwhile>
  __device__ __forceinline__ void exponentiate_in_order(Scores& s, float (&sum)[kRowsPerThread],
                                                        Hide hide, Meanwhile meanwhile) const {
    constexpr int kGroup = 4;
    constexpr int kAhead = 2 * kGroup;
    constexpr int kSize = decltype(cute::size(s))::value;
    static_assert(kSize % kGroup == 0 && kSize >= kAhead, "whole groups of scores");
    constexpr uint32_t kSign = 0x80000000;
    float offset[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      offset[r] = kOpen && is_open(r) ? 0.f : row_max[r] * scale_log2;
    }
    float chain[kGroup] = {};
    uint32_t scale = __float_as_uint(scale_log2);
    CUTE_UNROLL
    for (int i = 0; i < kSize + kAhead; i += kGroup) {
      if (i >= kAhead) {
        CUTE_UNROLL
        for (int j = 0; j < kGroup; ++j) {
          float const weight = s(i - kAhead + j);
          chain[j] = i == kAhead ? weight : chain[j] + weight;
        }
        scale |= __float_as_uint(chain[i / kGroup % kGroup]) & kSign;
      }
      if (i == kSize) {
        meanwhile(chain[i / kGroup % kGroup]);
      }
      if (i < kSize) {
        CUTE_UNROLL
        for (int j = i; j < i + kGroup; ++j) {
          float const x =
              fmaf(s(j), __uint_as_float(scale), -offset[AccumulatorPosition::row_of(j)]);
          s(j) = exp2_approx(hide(j, x));
        }
      }
    }
    sum[0] = chain[0] + chain[1];
    sum[1] = chain[2] + chain[3];
  }

  template <bool kMasked, class Scores, class TopOf>
  __device__ __forceinline__ bool follow(Scores& s, TopOf top_of,
                                         float (&rescale)[kRowsPerThread]) {
    bool moved = false;
    float high[kRowsPerThread];
    float offset[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      high[r] = top_of(r);
      rescale[r] = 1.f;
      if ((high[r] - row_max[r]) * scale_log2 > kSlack) {
        rescale[r] = exp2_approx((row_max[r] - high[r]) * scale_log2);
        row_max[r] = high[r];
        moved = true;
      }
      offset[r] = kMasked && row_max[r] == -INFINITY ? 0.f : row_max[r] * scale_log2;
    }
    moved = __any_sync(0xffffffff, moved);
    float sum[kRowsPerThread];
    exponentiate(s, sum, [&](int r) { return offset[r]; });
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_sum[r] = row_sum[r] * rescale[r] + sum[r];
    }
    return moved;
  }
};

}  // namespace sparse_fmha::device
