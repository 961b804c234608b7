// The main loop of a consumer warpgroup for one query tile: Q.K, softmax, P.V.
#pragma once

#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/negate.h"
#include "sparse_fmha/sm90/common/stay_behind.h"
#include "sparse_fmha/sm90/common/this_consumer.h"
#include "sparse_fmha/sm90/forward/epilogue.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/forward/loops.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/forward/scores_again.h"
#include "sparse_fmha/sm90/forward/stages.h"
#include "sparse_fmha/sm90/forward/step_policy.h"
#include "sparse_fmha/sm90/forward/turns.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct Accumulation {
  using MmaQK = typename Traits::MmaQK;
  using MmaPV = typename Traits::MmaPV;
  using TileK = cute::Int<Traits::kTileK>;
  using Storage = SharedStorage<Traits, Geometry>;
  using Work = typename Geometry::Work;
  using Store = Epilogue<Traits, Geometry>;
  using Turns = sm90::Turns<Traits>;
  using Policy = StepPolicy<Traits, Geometry>;
  static constexpr bool kReferenceLags = Policy::kReference != Reference::kMaximum;
  static constexpr bool kMaskedLag = Policy::kReference == Reference::kLagsOfMasked;

  KernelParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const& geometry;
  int const warpgroup;  // among the consumers
  Stages<Traits, Geometry>& stages;

  // Computes the sum over the walk's key tiles, not yet normalized.
  template <class Walk, class Output>
  __device__ __forceinline__ void run(Work const& work, Walk const& walk, int tiles,
                                      RingState<1> const& state_q, Store& store,
                                      OnlineSoftmax& softmax, Output& output) {
    using namespace cute;
    auto& state = stages.state;
    typename Geometry::Mask mask(geometry, warpgroup);
    mask.set(work);
    auto frag_q = operand_q<Traits>(smem.q, warpgroup);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_v<Traits>(smem.v);
    Weights<Traits> weights;
    auto add_bias = [&](auto& scores) {
      if constexpr (Traits::kKeyBias) {
        float const factor = params.soft_cap.apply(scores, params.scale_log2);
        return smem.key_biases.add(scores, state, factor,
                                   RowThresholds<Geometry>{params.bias, geometry, work});
      } else {
        return KeysShown::kAll;
      }
    };
    auto take_weights = [&](auto const& scores) { convert_into(scores, weights); };
    // The next tile's queries may be loaded as soon as the last scores are done.
    auto release_q = [&](bool last) {
      if (!Traits::kOutputReplacesQ && last) {
        smem.ring_q[warpgroup].release(state_q);
      }
    };
    [[maybe_unused]] float high[kRowsPerThread];
    float rescale[kRowsPerThread];
    std::conditional_t<Traits::kVotes, TileVote, NoVote> vote(
        params.skip, work.tile, softmax.scale_log2, warpgroup, [&](int r) {
          return geometry.has_row(work, warpgroup, AccumulatorPosition().row + 8 * r);
        });

    // Kept tiles, whose steps are the long ones, are not noted. Walks end with the first tile.
    constexpr bool kNotes = Traits::kVotes && Geometry::kNotesSkipped;
    [[maybe_unused]] SkippedTiles skipped;
    // Whether the bits of tile i are in another word than those of the tile before.
    [[maybe_unused]] auto begins_word = [&](int i) {
      if constexpr (kNotes) {
        return (tiles - i) % 32 == 0;
      } else {
        return false;
      }
    };
    [[maybe_unused]] auto note = [&](int i) {
      if constexpr (kNotes) {
        skipped.note(tiles - 1 - i);
      }
    };
    [[maybe_unused]] auto end_word = [&](int i) {
      if constexpr (kNotes) {
        if (begins_word(i)) {
          skipped.store(params.skip, work.tile, geometry.group(work, this_consumer()), tiles - i);
        }
      }
    };

    if (params.negate) {
      negate_rows<Traits>(smem.q, warpgroup);
      store.sync();
    }
    {
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      stages.enter(walk, 0);
      stages.wait(smem.ring_k, walk, 0, state);
      auto const place = geometry.mask_place(walk, 0, state);
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_q, frag_k(_, _, _, state.index), scores);
      auto const seen = mask.look_up(work, place);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      smem.ring_k.release(state);
      release_q(tiles == 1);
      add_bias(scores);
      if ((Policy::kByWalk || walk.num_partial > 0) && is_masked(walk, 0)) {
        hide_scores(scores, hidden_by(mask, seen));
      }
      if constexpr (Traits::kVotes) {
        softmax.own_tops(scores, high);
        vote.template leaves_out<true>(high);  // the first tile is kept: only counts
        softmax.share_tops(high);
        vote.keep(high);
        softmax.template update<true>(scores, high, rescale);
      } else {
        softmax.template update<true>(scores, rescale);
      }
      take_weights(scores);
    }

    // Multiplies the pending weights with their values.
    auto finish_weights = [&](int i) {
      stages.wait(smem.ring_v, walk, i, state);
      issue_mma<true, Traits::kTileK / 16>(MmaPV{}, weights, frag_v(_, _, _, state.index), output);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(state);
    };
    // Releases values that no weights need.
    auto drop_values = [&](int i, RingState<Traits::kStages> const& place) {
      stages.wait(smem.ring_v, walk, i, place);
      smem.ring_v.release(place);
    };
    auto issue_scores = [&](int i, auto& scores) {
      if constexpr (Policy::kQueriesAnew) {
        // Computed for each tile: a false dependence on its index. All of them at once need too
        // many uniform registers.
        auto queries = make_tensor(frag_q.data() + (i >> 28), frag_q.layout());
        issue_mma<false, Traits::kScoreSteps>(MmaQK{}, queries, frag_k(_, _, _, state.index),
                                              scores);
      } else {
        issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_q, frag_k(_, _, _, state.index),
                                              scores);
      }
    };
    RingState<Traits::kStages> previous;
    // Waits for the keys of the i-th tile.
    constexpr typename Policy::Streams kOthers{};
    auto reach = [&](int i, auto others) {
      previous = state;
      state.advance();
      stages.template enter<others.value>(walk, i);
      stages.template wait<others.value>(smem.ring_k, walk, i, state);
    };
    // Waits for the product of the previous weights with their values.
    auto end_multiply = [&] {
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(previous);
    };
    // Computes scores of the i-th tile, whose keys have landed, while the pending weights of the
    // previous tile (if any) are multiplied with their values; then new weights. kAhead: weights
    // are relative to the current reference, not to the maximum. Returns whether no rare case
    // remains (kAhead), or whether there are weights or the tile was skipped (otherwise). One
    // lambda for both: splitting it made ptxas move the wait for P.V, which cost 5% at 64 columns.
    auto inlined_step = [&](int i, auto masked, auto has_weights, auto ahead,
                            auto others) __attribute__((always_inline)) {
      constexpr bool kMasked = decltype(masked)::value;
      constexpr bool kWeights = decltype(has_weights)::value;
      constexpr bool kAhead = decltype(ahead)::value;
      [[maybe_unused]] constexpr bool kMayHide = kMasked || Traits::kKeyBias;
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      [[maybe_unused]] typename Geometry::MaskPlace place;
      [[maybe_unused]] typename Geometry::Mask::Seen seen;
      if constexpr (kMasked) {
        place = geometry.mask_place(walk, i, state);
      }
      Turns::wait(warpgroup);
      issue_scores(i, scores);
      if constexpr (kWeights) {
        stages.template wait<others.value>(smem.ring_v, walk, i - 1, previous);
        issue_mma<true, Traits::kTileK / 16>(MmaPV{}, weights, frag_v(_, _, _, previous.index),
                                             output);
      }
      Turns::pass(warpgroup);
      if constexpr (Traits::kVotes && !kWeights) {
        drop_values(i - 1, previous);
      }
      if constexpr (kMasked && Policy::kMaskLookUp == MaskLookUp::kUnderScores) {
        if (is_masked(walk, i)) {
          seen = mask.look_up(work, place);
        }
      }
      warpgroup_wait<kWeights ? 1 : 0>();
      warpgroup_fence_operand(scores);
      if constexpr (kMasked && Policy::kMaskLookUp == MaskLookUp::kBeforeRelease) {
        if (is_masked(walk, i)) {
          seen = mask.look_up(work, place);  // read from the stage before it is released
        }
      }
      if constexpr (kAhead) {
        KeysShown const shown = add_bias(scores);
        auto const hide = hidden_by<kMasked>(mask, seen);
        auto const seen_of_mask = seen_by<kMasked>(mask, seen);
        auto const sees = [&](int r) { return shown != KeysShown::kNone && seen_of_mask(r); };
        auto meet_values = [&] {
          if constexpr (kWeights) {
            end_multiply();
          }
        };
        float sum[kRowsPerThread];
        auto settle = [&] {
          softmax.settle(scores, sum, rescale, hide, sees, [&] {
            scores_again<Traits>(smem.q, smem.k + state.index * Storage::kKeyElements, warpgroup,
                                 scores);
            add_bias(scores);
          });
          rescale_rows(output, rescale);
        };
        auto release_keys = [&] {
          smem.ring_k.release(state);
          release_q(i + 1 == tiles);
        };
        if constexpr (Policy::kRounding == Rounding::kUnderExponentials) {
          bool const all = softmax.template weigh<true>(scores, sum, hide, sees, [&](float weight) {
            stay_behind(weight);
            meet_values();
          });
          take_weights(scores);
          if (all) {
            softmax.take(sum);
          } else {
            settle();
            take_weights(scores);
          }
          release_keys();
          return all;
        } else {
          if (!softmax.template weigh<Traits::kKeyBias>(scores, sum, hide, sees, [](float) {})) {
            meet_values();
            settle();
            release_keys();
            take_weights(scores);
            return false;
          }
          softmax.take(sum);
          release_keys();
          meet_values();
          take_weights(scores);
          return true;
        }
      } else {
        smem.ring_k.release(state);
        release_q(i + 1 == tiles);
        if constexpr (kMasked && Policy::kMaskLookUp == MaskLookUp::kAfterRelease) {
          seen = mask.look_up(work, place);
        }
        add_bias(scores);
        if (kMasked && is_masked(walk, i)) {
          hide_scores(scores, hidden_by<kMasked>(mask, seen));
        }
        bool moved;
        if constexpr (Traits::kVotes) {
          float theirs[kRowsPerThread];
          softmax.own_tops(scores, high);
          softmax.begin_sharing(high, theirs);
          if (vote.template leaves_out<kMasked>(high)) {
            note(i);
            if constexpr (kWeights) {
              end_multiply();
            }
            return false;
          }
          softmax.finish_sharing(high, theirs);
          vote.keep(high);
          if constexpr (kReferenceLags && (!kMasked || (kMaskedLag && kWeights))) {
            // Bitwise the same as without skipping. The keys may be gone, but the maximum is known.
            moved = softmax.weigh_known(scores, high, rescale);
          } else {
            moved = softmax.template update<kMasked>(scores, high, rescale);
          }
        } else {
          moved = softmax.template update<kMayHide>(scores, rescale);
        }
        if constexpr (kWeights) {
          if constexpr (Policy::kValueWait == ValueWait::kBehindFirst) {
            stay_behind(scores(6));
          }
          end_multiply();
        }
        take_weights(scores);
        if (moved) {
          rescale_rows(output, rescale);
        }
        return true;
      }
    };
    // With biases the step is more than nvcc inlines, and a call would put accumulators on the
    // stack.
    auto plain_step = [&](int i, auto... flags) { return inlined_step(i, flags...); };
    auto const& step = [&]() -> auto const& {
      if constexpr (Traits::kKeyBias) {
        return inlined_step;
      } else {
        return plain_step;
      }
    }();
    int i = 1;
    bool has_weights = true;
    constexpr typename Policy::MaximumFirst kMaximumFirst{};
    // Passes over the i-th tile if only other warpgroups need it; returns whether it did.
    auto is_for_others = [&](int i) {
      if constexpr (Policy::kNeeded) {
        auto next = state;
        next.advance();
        smem.ring_k.wait(next);
        if (geometry.needs(warpgroup, next)) {
          return false;
        }
        if (has_weights) {
          finish_weights(i - 1);
        } else if constexpr (Traits::kVotes) {
          drop_values(i - 1, state);
        }
        has_weights = false;
        smem.ring_k.release(next);
        release_q(i + 1 == tiles);
        if constexpr (!Traits::kVotes) {
          drop_values(i, next);
        }
        state = next;
        return true;
      }
      return false;
    };
    if constexpr (Traits::kVotes) {
      // This one compiles to different code if it is a function like those in loops.h. The values
      // of the previous tile always still have to be multiplied or released.
      auto visit = [&](auto masked) {
        reach(i, kOthers);
        has_weights = has_weights ? step(i, masked, true_type{}, kMaximumFirst, kOthers)
                                  : step(i, masked, false_type{}, kMaximumFirst, kOthers);
      };
      CUTE_NO_UNROLL
      for (; i < walk.num_partial; ++i) {
        end_word(i);
        if (is_for_others(i)) {
          continue;
        }
        visit(true_type{});
      }
      // Separate loops for the two cases keep the stages in uniform registers.
      constexpr bool_constant<Policy::kByWalk> kRest{};
      CUTE_NO_UNROLL
      while (i < tiles) {
        end_word(i);
        if (has_weights) {
          CUTE_NO_UNROLL
          do {
            reach(i, kOthers);
            has_weights = step(i++, kRest, true_type{}, kMaximumFirst, kOthers);
          } while (i < tiles && has_weights && !begins_word(i));
        } else {
          CUTE_NO_UNROLL
          do {
            reach(i, kOthers);
            has_weights = step(i++, kRest, false_type{}, kMaximumFirst, kOthers);
          } while (i < tiles && !has_weights && !begins_word(i));
        }
      }
      has_weights ? finish_weights(tiles - 1) : drop_values(tiles - 1, state);
      vote.add_to(params.skip, work.tile);
      end_word(i);
    } else {
      loop_over_partial<Policy>(walk, tiles, i, has_weights, reach, step, is_for_others);
      loop_over_rest<Policy>(walk, tiles, i, reach, step);
      if (has_weights) {
        finish_weights(tiles - 1);
      }
    }
    state.advance();
  }

 private:
  // Whether a key tile that may be partial is partial.
  template <class Walk>
  static __device__ __forceinline__ bool is_masked(Walk const& walk, int i) {
    if constexpr (Policy::kByWalk) {
      return walk.is_masked(i);
    } else {
      return true;
    }
  }
};

}  // namespace sparse_fmha::sm90
