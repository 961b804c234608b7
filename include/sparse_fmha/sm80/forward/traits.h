// The compile-time shape of a forward kernel of the family sm80, for all GPUs from Ampere on.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/cute.h"
#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::sm80 {

using namespace device;

// The shared memory that a block of any device of the architecture can have.
constexpr int smem_limit(Arch arch) { return (arch == Arch::kSm86 ? 99 : 163) * 1024; }

// Lanes that copy a row of a tile, a power of two: 16 bytes each, where there are as many.
template <int kRowDim>
inline constexpr int kLanesOfRow = kRowDim == 96 ? 16 : kRowDim / 8;

// A row of the kernel lists csrc/kernels/sm80_forward.def and sm86_forward.def.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          Skipping Skipping_, int Warps, Arch Arch_>
struct KernelConfig : TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr Skipping kSkipping = Skipping_;
  static constexpr int kWarps = Warps;
  static constexpr Arch kArch = Arch_;
  // Warps have as many rows as in the whole tile.
  template <int kRows>
  using WithTileQ = KernelConfig<Mechanism_, Element_, HeadDim, kRows, TileK, Stages, Skipping_,
                                 Warps * kRows / TileQ, Arch_>;
};

template <class Traits, class Geometry, class Mechanism>
struct Attention;
template <class Traits, class Geometry>
struct SharedStorage;

template <class Config_>
struct KernelTraits {
  using Config = Config_;
  static constexpr Pass kPass = Pass::kForward;
  template <class Geometry, class Mechanism>
  using Body = Attention<KernelTraits, Geometry, Mechanism>;
  template <class Geometry>
  using Storage = SharedStorage<KernelTraits, Geometry>;
  template <int kRows>
  using WithTileQ = KernelTraits<typename Config::template WithTileQ<kRows>>;
  using Element = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileK = Config::kTileK;
  static constexpr int kStages = Config::kStages;
  static constexpr bool kVotes = Config::kSkipping == Skipping::kByThreshold;
  static SPARSE_FMHA_HD TileShape tile_shape() { return {{1, 1, kTileQ}, {1, 1, kTileK}}; }

  static_assert(sizeof(Element) == 2, "the kernels are for fp16 and bf16");
  static_assert(kHeadDim % 16 == 0 && kHeadDim <= 256, "products step over 16 elements of a head");
  static_assert(kTileQ == 64 || kTileQ == 128, "one or two groups of 64 rows");
  static_assert(kTileK % 32 == 0 && kTileK <= 128, "masks are words of 32 columns, at most four");
  static_assert(kStages == 1 || kStages == 2, "the main loop is written for one or two stages");

  static constexpr int kWarps = Config::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kTileQ / kWarps;  // of queries
  static constexpr int kRowTiles = kWarpRows / 16;   // of the 16 rows of a matrix instruction
  static_assert(kWarps * kWarpRows == kTileQ && (kRowTiles == 1 || kRowTiles == 2) &&
                    kRowTiles * 16 == kWarpRows,
                "a warp has 16 or 32 rows");
  static constexpr int kAddresses = 8;  // of copies, that a thread finds at a time
  // Groups of 64 rows mask together, and vote together.
  static constexpr int kGroups = kTileQ / 64;
  static_assert(!kVotes || kWarpRows == 16, "the vote is that of four warps");

  // Elements of a row in shared memory (chunk_place() in device/mma_tile.h). Rows of 96 let two
  // thread blocks fit 99 KB; where both fit anyway, rows of 128 measured 3% faster.
  static constexpr bool kShortRows = kHeadDim == 96 && Config::kArch == Arch::kSm86;
  static constexpr int kRowDim = kShortRows ? 96 : (kHeadDim + 63) / 64 * 64;
  static constexpr int kTileElements = kTileK * kRowDim;  // of keys or values
  static constexpr int kQueryElements = kTileQ * kRowDim;
  // Queries stay in registers if there are enough of them: with the output and scores of a thread's
  // row tiles they take 208 at most, of one row tile of head dim 256 and 32 keys. Scores of two row
  // tiles and 128 keys alone take 128, and such rows spilled.
  static constexpr bool kQueriesInRegisters =
      (kRowTiles * kHeadDim <= 128 && kRowTiles * kTileK < 256) || (kRowTiles == 1 && kTileK == 32);
  // They then pass through the last stage: the second, which is free until the first tile is
  // computed, or the only one, and the first tile is copied after that.
  static constexpr bool kQueriesShareStage =
      kQueriesInRegisters && kQueryElements <= 2 * kTileElements;
  static constexpr bool kQueriesFirst = kQueriesShareStage && kStages == 1;
  static constexpr int kElements =
      2 * kStages * kTileElements + (kQueriesShareStage ? 0 : kQueryElements);
  static_assert(kQueryElements <= kElements, "the output passes through the same memory");

  static constexpr int kSmemLimit = smem_limit(Config::kArch);
};

// What a block has in shared memory.
template <class Traits, class Geometry>
struct SharedStorage {
  alignas(128) typename Traits::Element tiles[Traits::kElements];
  alignas(16) typename Geometry::Shared geometry;
  alignas(16) char work[sizeof(typename Geometry::Work)];

  // The place of keys of a stage; its values follow.
  __device__ __forceinline__ typename Traits::Element* keys(int stage) {
    return tiles + stage * 2 * Traits::kTileElements;
  }
  __device__ __forceinline__ typename Traits::Element* values(int stage) {
    return keys(stage) + Traits::kTileElements;
  }
  __device__ __forceinline__ typename Traits::Element* queries() {
    return keys(Traits::kStages - (Traits::kQueriesShareStage ? 1 : 0));
  }
};

}  // namespace sparse_fmha::sm80
