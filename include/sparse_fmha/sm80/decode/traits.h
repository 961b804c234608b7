// The compile-time shape of a decode kernel of the family sm80. One kernel serves both
// architectures: its stages fit 99 KB of shared memory, and more blocks run where there is more.
#pragma once

#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

// A row of the kernel list csrc/kernels/sm80_decode.def.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          Skipping Skipping_>
struct DecodeConfig : TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr Skipping kSkipping = Skipping_;
};

template <class Config_>
struct DecodeTraits {
  using Config = Config_;
  using Element = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileK = Config::kTileK;
  static constexpr bool kVotes = Config::kSkipping == Skipping::kByThreshold;
  static_assert(sizeof(Element) == 2 && kHeadDim % 64 == 0 && kHeadDim <= 256,
                "rows in shared memory are whole groups of eight chunks");
  static_assert(kTileQ == 64 && kTileK == 64, "groups of rows and tiles of core/decode.h");

  static constexpr int kWarps = 4;  // 16 rows each
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowDim = kHeadDim;
  // Where a chunk of eight elements of a tile of keys or values is.
  static constexpr SPARSE_FMHA_HD int place(int row, int chunk) {
    return chunk_place<kRowDim>(row, chunk);
  }
  static constexpr int kTileElements = kTileK * kRowDim;  // of keys or values

  // A stage holds a tile of keys or of values.
  static constexpr int kStages = Config::kStages;
  static_assert(kStages >= 2, "one tile is copied while another is computed");
  // Queries stay in registers if there are enough of them, and get there through the last stage,
  // which nothing is copied to before they have.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  static constexpr int kElements = (kStages + (kQueriesInRegisters ? 0 : 1)) * kTileElements;
  // On a multiprocessor at a time, if its shared memory is large enough: as many as registers
  // allow at head dim 64. At 128 a third one spills, and does not fit 164 KB.
  static constexpr int kMostBlocks = kHeadDim > 64 ? 2 : kVotes ? 3 : 4;
  // On one with 100 KB of shared memory.
  static constexpr int kLeastBlocks = kHeadDim > 64 ? 1 : 2;
  // Groups of rows whose keys each block finds by itself.
  static constexpr int kPlannedGroups = kHeadDim <= 128 ? 256 : 24;
  // The tiles from the one that is computed to the last one that is copied meanwhile. A place is
  // written anew once all threads have left the tile before.
  static constexpr int kPlaces = kVotes ? kStages : (kStages - 1) / 2 + 2;
};

}  // namespace sparse_fmha::sm80
