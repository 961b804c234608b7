// The compile-time shape of a decode kernel.
#pragma once

#include "sparse_fmha/sm90/forward/traits.h"

namespace sparse_fmha::sm90 {

// A row of the kernel list csrc/kernels/sm90_decode.def.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          Skipping Skipping_>
struct DecodeConfig : TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr Skipping kSkipping = Skipping_;
};

template <class Config>
struct DecodeTraits : TileTraits<Config> {
  static constexpr bool kVotes = Config::kSkipping == Skipping::kByThreshold;
  // With votes, the values of a tile are asked for after its scores are known, and multiplied after
  // the scores of the next kept tile: two tiles of values are under way. Keys are ahead of them.
  static constexpr int kValueStages = Config::kStages - (kVotes ? 1 : 0);
  // By how many tiles a producer of both runs ahead with keys.
  static constexpr int kKeysAhead = 2;
  static_assert(!kVotes || (kValueStages >= 2 && kKeysAhead < Config::kStages),
                "a tile of values waits in its stage for the next one");
};

}  // namespace sparse_fmha::sm90
