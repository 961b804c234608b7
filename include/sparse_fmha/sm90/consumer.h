// A consumer warpgroup: 64 query rows against every key tile of the walk.
#pragma once

#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/epilogue.h"
#include "sparse_fmha/sm90/issue.h"
#include "sparse_fmha/sm90/negate.h"
#include "sparse_fmha/sm90/params.h"
#include "sparse_fmha/sm90/scores_again.h"
#include "sparse_fmha/sm90/skip.h"
#include "sparse_fmha/sm90/turns.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct Consumer {
  using Element = typename Traits::Element;
  using MmaQK = typename Traits::MmaQK;
  using MmaPV = typename Traits::MmaPV;
  using HeadDim = cute::Int<Traits::kHeadDim>;
  using TileK = cute::Int<Traits::kTileK>;

  KernelParams<Geometry, Mechanism> const& params;
  SharedStorage<Traits, Geometry>& smem;
  Geometry const geometry;
  int const warpgroup;               // among the consumers
  RingState<Traits::kStages> state;  // of the key tile at hand; its value tile has the same

  __device__ __forceinline__ void run() {
    RingState<1> state_q;
    RingState<1> state_work;
    if (warpgroup == 0) {
      Turns::give_to(0);
    }
    while (true) {
      Work const work = smem.work.get(state_work);
      state_work.advance();
      if (work.tile.batch < 0) {
        break;
      }
      attend(work, state_q);
    }
    Store{geometry, smem, warpgroup}.wait_for_store();
  }

 private:
  using Storage = SharedStorage<Traits, Geometry>;
  using Work = typename Geometry::Work;
  using Store = Epilogue<Traits, Geometry>;
  using Turns = sm90::Turns<Traits>;
  static_assert(!(Traits::kTakeTurns && Geometry::kSkips),
                "warpgroups in turns do equal numbers of steps");
  // Whether scores that a mask has cut become weights before their maximum is known, too: where the
  // mask is looked up ahead of them, and where weights are at hand (with both cases ptxas leaves
  // the uniform registers: 24 moves a step, 4%).
  static constexpr bool kMaskedLag =
      Traits::kReferenceLags && Geometry::kSkips && Traits::kMaskAhead;

  // One query tile.
  __device__ __forceinline__ void attend(Work const& work, RingState<1>& state_q) {
    auto const walk = geometry.part_walk(work, warpgroup);
    int const loaded = geometry.tiles_loaded(work);
    int const tiles = walk.num_partial + walk.num_full;

    auto output = cute::partition_fragment_C(MmaPV{}, cute::Shape<cute::_64, HeadDim>{});
    OnlineSoftmax softmax(params.scale_log2);
    Store store{geometry, smem, warpgroup};
    cute::clear(output);
    if constexpr (!Geometry::kPassesOver) {
      pass_over(loaded - tiles, loaded);
    }
    smem.ring_q[warpgroup].wait(state_q);
    if (tiles > 0) {
      accumulate(work, walk, tiles, state_q, store, softmax, output);
    } else if constexpr (!Traits::kOutputReplacesQ) {
      smem.ring_q[warpgroup].release(state_q);
    }

    if constexpr (Geometry::kPassesOver) {
      pass_over(loaded - (tiles > 0 ? walk.position(tiles - 1) + 1 : 0), loaded);
    }

    float rescale[kRowsPerThread];
    float lse[kRowsPerThread];
    softmax.finish(rescale, lse);
    rescale_rows(output, rescale);
    store.store(output, lse, work);
    if constexpr (Traits::kOutputReplacesQ) {
      store.wait_for_store();
      store.sync();
      smem.ring_q[warpgroup].release(state_q);
    }
    state_q.advance();
  }

  // The next `count` of the `loaded` key tiles are for other warpgroups.
  __device__ __forceinline__ void pass_over(int count, int loaded) {
    CUTE_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      smem.ring_k.wait(state);
      smem.ring_k.release(state);
      smem.ring_v.wait(state);
      smem.ring_v.release(state);
      state.advance();
      if (i + 1 < loaded) {
        Turns::wait(warpgroup);
        Turns::pass(warpgroup);
      }
    }
  }

  // From the stage before the i-th of the walk to that; kOthers: the other's may lie between them.
  template <bool kOthers = Geometry::kPassesOver, class Walk>
  __device__ __forceinline__ void enter(Walk const& walk, int i) {
    if constexpr (kOthers) {
      if (walk.follows_other(i)) {
        state.advance();
      }
    }
  }
  // Until the i-th stage of the walk, at `place`, has landed. The one that is passed over on the
  // way is given back here, keys and values each in their time: the products do not wait.
  template <bool kOthers = Geometry::kPassesOver, class Walk>
  __device__ __forceinline__ void wait(Ring<Traits::kStages>& ring, Walk const& walk, int i,
                                       RingState<Traits::kStages> const& place) {
    if constexpr (kOthers) {
      if (walk.follows_other(i)) {
        auto passed = place;
        passed.retreat();
        ring.wait(passed);
        ring.release(passed);
      }
    }
    ring.wait(place);
    if constexpr (Geometry::kGathers) {
      cutlass::arch::fence_view_async_shared();  // the matrix unit reads what threads have copied
    }
  }

  // The sum over the walk's key tiles, not yet normalised.
  template <class Walk, class Output>
  __device__ __forceinline__ void accumulate(Work const& work, Walk const& walk, int tiles,
                                             RingState<1> const& state_q, Store& store,
                                             OnlineSoftmax& softmax, Output& output) {
    using namespace cute;
    typename Geometry::Mask mask(geometry, warpgroup);
    mask.set(work);
    auto thread_qk = MmaQK{}.get_slice(threadIdx.x % 128);
    auto thread_pv = MmaPV{}.get_slice(threadIdx.x % 128);
    auto smem_q = local_tile(make_tensor(make_smem_ptr(smem.q), typename Traits::LayoutQ{}),
                             Shape<_64, HeadDim>{}, make_coord(warpgroup, _0{}));
    auto smem_k = make_tensor(make_smem_ptr(smem.k), typename Traits::LayoutK{});
    auto smem_v = make_tensor(make_smem_ptr(smem.v), typename Traits::LayoutVt{});
    auto frag_q = thread_qk.partition_fragment_A(smem_q);
    auto frag_k = thread_qk.partition_fragment_B(smem_k);
    auto frag_v = thread_pv.partition_fragment_B(smem_v);
    // The accumulator of Q.K is, register for register, the first operand of P.V.
    auto weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<TileK{} / 16>>>{});
    auto take_weights = [&](auto const& scores) { convert_into(scores, weights); };
    // The next tile's queries can come as soon as the last scores are there.
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

    if (params.negate) {
      negate_rows<Traits>(smem.q, warpgroup);
      store.sync();
    }
    {
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      enter(walk, 0);
      wait(smem.ring_k, walk, 0, state);
      auto const box = geometry.box(walk, 0, state);
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_q, frag_k(_, _, _, state.index), scores);
      auto const seen = mask.look_up(work, box);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      smem.ring_k.release(state);
      release_q(tiles == 1);
      if ((Geometry::kMasksSome || walk.num_partial > 0) && is_masked(walk, 0)) {
        hide_scores(scores, hidden_by(mask, seen));
      }
      if constexpr (Traits::kVotes) {
        softmax.row_tops(scores, high);
        vote.template leaves_out<true>(high);  // never the first: only counted
        softmax.template update<true>(scores, high, rescale);
      } else {
        softmax.template update<true>(scores, rescale);
      }
      take_weights(scores);
    }

    // The weights at hand meet their values.
    auto finish_weights = [&](int i) {
      wait(smem.ring_v, walk, i, state);
      issue_mma<true, Traits::kTileK / 16>(MmaPV{}, weights, frag_v(_, _, _, state.index), output);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(state);
    };
    // Gives back values that no weights meet.
    auto drop_values = [&](int i, RingState<Traits::kStages> const& place) {
      wait(smem.ring_v, walk, i, place);
      smem.ring_v.release(place);
    };
    RingState<Traits::kStages> previous;
    // Until the keys of the i-th tile are there.
    constexpr bool_constant<Geometry::kPassesOver> kOthers{};
    auto reach = [&](int i, auto others) {
      previous = state;
      state.advance();
      enter<others.value>(walk, i);
      wait<others.value>(smem.ring_k, walk, i, state);
    };
    // Scores of the i-th tile, which has been reached, while weights of the one before it, if any
    // are at hand, meet their values. Tells whether there are weights then, or the tile was left
    // out.
    auto step = [&](int i, auto masked, auto has_weights, auto lags) {
      constexpr bool kMasked = decltype(masked)::value;
      constexpr bool kWeights = decltype(has_weights)::value;
      constexpr bool kLags = decltype(lags)::value && Traits::kReferenceLags;
      static_assert(!kMasked || !kLags || kMaskedLag, "the mask is applied a second time");
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      [[maybe_unused]] typename Geometry::Box box;
      if constexpr (kMasked) {
        box = geometry.box(walk, i, state);
      }
      bool const open = kLags && softmax.is_open();
      Turns::wait(warpgroup);
      issue_mma<false, Traits::kScoreSteps>(MmaQK{}, frag_q, frag_k(_, _, _, state.index), scores);
      if constexpr (kWeights) {
        wait<Geometry::kPassesOver && !kLags>(smem.ring_v, walk, i - 1, previous);
        issue_mma<true, Traits::kTileK / 16>(MmaPV{}, weights, frag_v(_, _, _, previous.index),
                                             output);
      }
      Turns::pass(warpgroup);
      if constexpr (Traits::kVotes && !kWeights) {
        drop_values(i - 1, previous);
      }
      [[maybe_unused]] typename Geometry::Mask::Seen seen;
      if constexpr (kMasked && Traits::kMaskAhead) {
        if (is_masked(walk, i)) {
          seen = mask.look_up(work, box);
        }
      }
      warpgroup_wait<kWeights ? 1 : 0>();
      warpgroup_fence_operand(scores);
      bool moved;
      if constexpr (kLags) {
        auto again = [&] {
          scores_again<Traits>(smem.q, smem.k + state.index * Storage::kTileElements, warpgroup,
                               scores);
        };
        auto const hide = hidden_by<kMasked>(mask, seen);
        moved = softmax.template weigh<Element>(scores, rescale, open, hide, again);
      }
      if constexpr (kMasked && Geometry::kMaskInStage && !Traits::kMaskAhead) {
        if (is_masked(walk, i)) {
          seen = mask.look_up(work, box);  // from the stage: before that is released
        }
      }
      smem.ring_k.release(state);
      release_q(i + 1 == tiles);
      if constexpr (kMasked && !kLags) {
        if constexpr (!Geometry::kMaskInStage && !Traits::kMaskAhead) {
          seen = mask.look_up(work, box);
        }
        if (is_masked(walk, i)) {
          hide_scores(scores, hidden_by(mask, seen));
        }
      }
      if constexpr (Traits::kVotes) {
        softmax.row_tops(scores, high);
        if (vote.template leaves_out<kMasked>(high)) {
          if constexpr (kWeights) {
            warpgroup_wait<0>();
            warpgroup_fence_operand(output);
            smem.ring_v.release(previous);
          }
          return false;
        }
        if constexpr (Traits::kReferenceLags && (!kMasked || (kMaskedLag && kWeights))) {
          // As where nothing is left out, bit by bit; the keys may be gone, but the maximum is
          // known.
          bool const far = softmax.template is_far_behind<Element>(high);
          moved = softmax.template weigh<Element>(scores, rescale, far, HideNone{}, [] {});
        } else {
          moved = softmax.template update<kMasked>(scores, high, rescale);
        }
      } else if constexpr (!kLags) {
        moved = softmax.template update<kMasked>(scores, rescale);
      }
      if constexpr (kWeights) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(output);
        smem.ring_v.release(previous);
      }
      take_weights(scores);
      if (moved) {
        rescale_rows(output, rescale);
      }
      return true;
    };
    int i = 1;
    bool has_weights = true;
    if constexpr (Traits::kVotes) {
      // The values of the tile before are always still to be met or given back.
      auto visit = [&](auto masked) {
        reach(i, kOthers);
        has_weights = has_weights ? step(i, masked, true_type{}, false_type{})
                                  : step(i, masked, false_type{}, false_type{});
      };
      CUTE_NO_UNROLL
      for (; i < walk.num_partial; ++i) {
        if constexpr (Geometry::kSkips) {
          RingState<Traits::kStages> next = state;
          next.advance();
          smem.ring_k.wait(next);
          if (!geometry.needs(warpgroup, next)) {
            has_weights ? finish_weights(i - 1) : drop_values(i - 1, state);
            has_weights = false;
            smem.ring_k.release(next);
            release_q(i + 1 == tiles);
            state = next;
            continue;
          }
        }
        visit(true_type{});
      }
      // Loops of their own for both cases keep the stages in uniform registers.
      constexpr bool_constant<Geometry::kMasksSome> kRest{};
      CUTE_NO_UNROLL
      while (i < tiles) {
        if (has_weights) {
          CUTE_NO_UNROLL
          while (i < tiles && has_weights) {
            reach(i, kOthers);
            has_weights = step(i++, kRest, true_type{}, false_type{});
          }
        } else {
          CUTE_NO_UNROLL
          while (i < tiles && !has_weights) {
            reach(i, kOthers);
            has_weights = step(i++, kRest, false_type{}, false_type{});
          }
        }
      }
      has_weights ? finish_weights(tiles - 1) : drop_values(tiles - 1, state);
      vote.add_to(params.skip, work.tile);
    } else {
      if constexpr (Geometry::kSkips) {
        // Some of the partial tiles are for the other warpgroups alone.
        CUTE_NO_UNROLL
        for (; i < tiles && (i < walk.num_partial || !has_weights); ++i) {
          RingState<Traits::kStages> next = state;
          next.advance();
          smem.ring_k.wait(next);
          if (!geometry.needs(warpgroup, next)) {
            if (has_weights) {
              finish_weights(i - 1);
              has_weights = false;
            }
            smem.ring_k.release(next);
            release_q(i + 1 == tiles);
            smem.ring_v.wait(next);
            smem.ring_v.release(next);
            state = next;
          } else if (has_weights) {
            reach(i, kOthers);
            step(i, true_type{}, true_type{}, bool_constant<kMaskedLag>{});
          } else {
            reach(i, kOthers);
            step(i, true_type{}, false_type{}, false_type{});
            has_weights = true;
          }
        }
      } else {
        CUTE_NO_UNROLL
        for (; i < walk.num_partial; ++i) {
          reach(i, kOthers);
          step(i, true_type{}, true_type{}, false_type{});
        }
      }
      if constexpr (Geometry::kMasksSome && Traits::kMaskAhead) {
        // The first and the last ones are masked.
        int masked_end = walk.whole.begin;
        CUTE_NO_UNROLL
        while (i < tiles) {
          CUTE_NO_UNROLL
          for (; i < masked_end; ++i) {
            reach(i, kOthers);
            step(i, true_type{}, true_type{}, false_type{});
          }
          if constexpr (Traits::kReferenceLags) {
            CUTE_NO_UNROLL
            for (; i < walk.whole.end && walk.both == tiles; ++i) {
              reach(i, false_type{});
              step(i, false_type{}, true_type{}, true_type{});
            }
          }
          // Stages of its own a consumer gives back as early as it can: fetching them is the limit.
          CUTE_NO_UNROLL
          for (; i < walk.whole.end; ++i) {
            reach(i, kOthers);
            step(i, false_type{}, true_type{}, false_type{});
          }
          masked_end = tiles;
        }
      } else {
        CUTE_NO_UNROLL
        for (; i < tiles; ++i) {
          reach(i, kOthers);
          step(i, bool_constant<Geometry::kMasksSome>{}, true_type{},
               bool_constant<!Geometry::kMasksSome>{});
        }
      }
      if (has_weights) {
        finish_weights(tiles - 1);
      }
    }
    state.advance();
  }

  // Whether a key tile that may be partial is.
  template <class Walk>
  static __device__ __forceinline__ bool is_masked(Walk const& walk, int i) {
    if constexpr (Geometry::kMasksSome) {
      return walk.is_masked(i);
    } else {
      return true;
    }
  }
};

}  // namespace sparse_fmha::sm90
