// How a consumer goes over the key tiles of a query tile: every choice that depends on the kernel's
// shape or on the geometry, made in this one place. What is measured of them is in docs/design.md.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

// What scores become weights against.
enum class Reference {
  kMaximum,      // their maximum, which is found first
  kLags,         // the reference as it stands; of masked scores still the maximum
  kLagsOfMasked  // the same, also of masked scores
};

// When the mask of a tile is looked up.
enum class MaskLookUp {
  kUnderScores,    // while its scores are being computed
  kBeforeRelease,  // behind them, while its stage is there
  kAfterRelease    // behind them, when the stage has been given back
};

// When weights against the reference as it stands are rounded.
enum class Rounding {
  kUnderExponentials,  // before their sum is judged, while they could still become others
  kAfterSum
};

// Where P.V is waited for when the maximum is found first.
enum class ValueWait {
  kBehindFirst,  // the first exponentials, for rounding beside the others
  kBehindLast    // where ptxas puts it, and must where three consumers share the matrix unit
};

// Who drives the steps. Partial tiles come first, then the rest.
enum class PartialLoop {
  kAll,    // each partial tile
  kNeeded  // those that a consumer needs; it passes over the others
};
enum class RestLoop {
  kEach,  // tile by tile
  kLags,  // against the reference as it stands, until something rare has to be seen to
  kSpans  // masked ones, then some without a mask, then masked ones
};

template <class Traits, class Geometry>
struct StepPolicy {
  static constexpr bool kNeeded = Geometry::kStageUse == StageUse::kNeeded;
  static constexpr bool kByWalk = Geometry::kMaskedStages == MaskedStages::kByWalk;

  // A thread has registers for the mask of scores that are still being computed, or not.
  static constexpr MaskLookUp kMaskLookUp = Traits::kHeadDim <= 128 ? MaskLookUp::kUnderScores
                                            : Geometry::kMaskFrom == MaskFrom::kPositions
                                                ? MaskLookUp::kAfterRelease
                                                : MaskLookUp::kBeforeRelease;

  // At 64 columns the unit for exponentials is as busy as the matrix unit, at 256 a thread has no
  // registers to keep scores until their sum is known.
  static constexpr Reference kReference = Traits::kHeadDim != 128 ? Reference::kMaximum
                                          : kNeeded               ? Reference::kLagsOfMasked
                                                                  : Reference::kLags;

  // With two consumers a thread has registers for weights and what they are rounded to.
  static constexpr Rounding kRounding =
      Traits::kConsumers == 2 ? Rounding::kUnderExponentials : Rounding::kAfterSum;

  static constexpr ValueWait kValueWait =
      kNeeded && Traits::kHeadDim == 64 ? ValueWait::kBehindFirst : ValueWait::kBehindLast;

  static constexpr PartialLoop kPartialLoop = kNeeded ? PartialLoop::kNeeded : PartialLoop::kAll;
  static constexpr RestLoop kRestLoop =
      kByWalk && kMaskLookUp == MaskLookUp::kUnderScores ? RestLoop::kSpans
      : kReference != Reference::kMaximum && !kByWalk    ? RestLoop::kLags
                                                         : RestLoop::kEach;

  static_assert(!(Traits::kTakeTurns && kNeeded), "warpgroups in turns do equal numbers of steps");

  // What a step is told, as types: whether its tile may be masked, whether the weights of the tile
  // before are at hand, whether its scores are weighed against the reference as it stands, and
  // whether another consumer's stages may lie before it.
  using Yes = cute::true_type;
  using No = cute::false_type;
  using Ahead = Yes;
  using MaximumFirst = No;
  using Streams = cute::bool_constant<kHasStreams<Geometry>>;
  // Whether a tile behind the partial ones may be masked.
  using RestMasked = cute::bool_constant<kByWalk>;
};

}  // namespace sparse_fmha::sm90
