// How a consumer processes the key tiles of a query tile. Every choice that depends on the kernel's
// shape or the geometry is made here. docs/design.md has the measurements.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

// What the weights of a tile are relative to.
enum class Reference {
  kMaximum,      // their maximum, which is found first
  kLags,         // the current reference; for masked scores still the maximum
  kLagsOfMasked  // the current reference, also for masked scores
};

// When the mask of a tile is looked up.
enum class MaskLookUp {
  kUnderScores,    // while its scores are being computed
  kBeforeRelease,  // after them, before its stage is released
  kAfterRelease    // after them, when the stage has been released
};

// When weights relative to the current reference are rounded.
enum class Rounding {
  kUnderExponentials,  // before their sum is checked, when they may still change
  kAfterSum
};

// Where to wait for P.V if the maximum is found first.
enum class ValueWait {
  kBehindFirst,  // after the first exponentials, so rounding overlaps the others
  kBehindLast    // where ptxas puts it; required if three consumers share the matrix unit
};

// The loops that run the steps: partial tiles, then the rest.
enum class PartialLoop {
  kAll,    // every partial tile
  kNeeded  // those that a consumer needs; it passes over the others
};
enum class RestLoop {
  kEach,  // tile by tile
  kLags,  // against the current reference, until a rare case has to be handled
  kSpans  // masked tiles, then tiles without a mask, then masked ones
};

template <class Traits, class Geometry>
struct StepPolicy {
  static constexpr bool kNeeded = Geometry::kStageUse == StageUse::kNeeded;
  static constexpr bool kByWalk = Geometry::kMaskedStages == MaskedStages::kByWalk;

  // Depends on whether a thread has registers for the mask while the scores are being computed.
  static constexpr MaskLookUp kMaskLookUp = Traits::kValueDim <= 128 ? MaskLookUp::kUnderScores
                                            : Geometry::kMaskFrom == MaskFrom::kPositions
                                                ? MaskLookUp::kAfterRelease
                                                : MaskLookUp::kBeforeRelease;

  // At 64 columns the exponential unit is as busy as the matrix unit, so three consumers wait for
  // it either way. At 256 a thread has no registers to keep scores until their sum is known.
  static constexpr bool kCanLag =
      Traits::kValueDim == 128 ||
      (Traits::kValueDim == 64 && Traits::kConsumers == 2 && !Traits::kKeyBias);
  static constexpr Reference kReference = !kCanLag  ? Reference::kMaximum
                                          : kNeeded ? Reference::kLagsOfMasked
                                                    : Reference::kLags;

  // Whether addresses of the queries are computed for each tile: three consumers have no registers
  // to keep more than eight.
  static constexpr bool kQueriesAnew = Traits::kConsumers > 2 && Traits::kScoreSteps > 8;

  // Up to two consumers have registers for both the weights and their rounded values.
  static constexpr Rounding kRounding =
      Traits::kConsumers <= 2 ? Rounding::kUnderExponentials : Rounding::kAfterSum;

  static constexpr ValueWait kValueWait =
      kNeeded && Traits::kHeadDim == 64 ? ValueWait::kBehindFirst : ValueWait::kBehindLast;

  static constexpr PartialLoop kPartialLoop = kNeeded ? PartialLoop::kNeeded : PartialLoop::kAll;
  static constexpr RestLoop kRestLoop =
      kByWalk && kMaskLookUp == MaskLookUp::kUnderScores ? RestLoop::kSpans
      : kReference != Reference::kMaximum && !kByWalk    ? RestLoop::kLags
                                                         : RestLoop::kEach;

  static_assert(!(Traits::kTakeTurns && kNeeded), "warpgroups in turns do equal numbers of steps");

  // Compile-time flags of a step: whether its tile may be masked, whether weights of the previous
  // tile are pending, whether weights are relative to the current reference, and whether stages of
  // another consumer may come before it.
  using Yes = cute::true_type;
  using No = cute::false_type;
  using Ahead = Yes;
  using MaximumFirst = No;
  using Streams = cute::bool_constant<kHasStreams<Geometry>>;
  // Whether a tile after the partial ones may be masked.
  using RestMasked = cute::bool_constant<kByWalk>;
};

}  // namespace sparse_fmha::sm90
