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

// A row of the kernel lists csrc/kernels/sm80_forward.def and sm86_forward.def.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          Skipping Skipping_, Arch Arch_>
struct KernelConfig : TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr Skipping kSkipping = Skipping_;
  static constexpr Arch kArch = Arch_;
  template <int kRows>
  using WithTileQ =
      KernelConfig<Mechanism_, Element_, HeadDim, kRows, TileK, Stages, Skipping_, Arch_>;
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

  // A warp computes 16 query rows; four warps are a group, which votes and masks together.
  static constexpr int kWarps = kTileQ / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kGroups = kTileQ / 64;

  // Elements of a row in shared memory: chunks of 16 bytes are swizzled in groups of eight.
  static constexpr int kRowDim = (kHeadDim + 63) / 64 * 64;
  static constexpr int kTileElements = kTileK * kRowDim;  // of keys or values
  static constexpr int kQueryElements = kTileQ * kRowDim;
  // Queries stay in registers if there are enough of them.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  // They then pass through the second stage, which is free until the first tile is computed.
  static constexpr bool kQueriesShareStage =
      kQueriesInRegisters && kStages == 2 && kQueryElements <= 2 * kTileElements;
  static constexpr int kElements =
      2 * kStages * kTileElements + (kQueriesShareStage ? 0 : kQueryElements);
  static_assert(kQueryElements <= kElements, "the output passes through the same memory");

  // Where a chunk of eight elements of a tile of keys or values is.
  static constexpr SPARSE_FMHA_HD int place(int row, int chunk) {
    return chunk_place<kRowDim>(row, chunk);
  }
  static constexpr int kSmemLimit = smem_limit(Config::kArch);
};

// What a block has in shared memory.
template <class Traits, class Geometry>
struct SharedStorage {
  alignas(128) typename Traits::Element tiles[Traits::kElements];
  alignas(16) typename Geometry::Shared geometry;

  // The place of keys of a stage; its values follow.
  __device__ __forceinline__ typename Traits::Element* keys(int stage) {
    return tiles + stage * 2 * Traits::kTileElements;
  }
  __device__ __forceinline__ typename Traits::Element* values(int stage) {
    return keys(stage) + Traits::kTileElements;
  }
  __device__ __forceinline__ typename Traits::Element* queries() {
    return keys(Traits::kQueriesShareStage ? 1 : Traits::kStages);
  }
};

}  // namespace sparse_fmha::sm80
