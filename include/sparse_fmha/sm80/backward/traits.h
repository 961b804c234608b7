// The compile-time shape of a backward kernel of the family sm80.
//
// The kernels have one structure. A thread block keeps the rows of two tensors, and tiles of two
// others pass by, whose rows are the columns of the scores:
//
//          stay (first, second)   pass (first, second)   sums
//   dQ     Q, dO                  K, V                   dS K
//   dK/dV  K, V                   Q, dO                  dS^T Q, P^T dO
//   all    K, V                   Q, dO                  the same, and dS K of each step in memory
//
// The scores are first x first, the gradients of the weights second x second. Each warp computes
// some rows. With kSharing = 2, two warps have the same rows: each computes half of the columns of
// the scores and half of the columns of the sums, and the factors of the sums pass through shared
// memory. Fragments are then used more often, so fewer are loaded.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm80/backward/config.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

template <class Config_, Pass kPass_>
struct BackwardTraits {
  using Config = Config_;
  using Element = typename Config::Element;
  static constexpr Pass kPass = kPass_;
  static constexpr bool kAddsDq = kPass == Pass::kBackwardFused;
  static constexpr bool kOfKeys = kPass == Pass::kBackwardDkv || kAddsDq;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileK = Config::kTileK;
  static constexpr bool kVotes = false;
  static SPARSE_FMHA_HD TileShape tile_shape() { return {{1, 1, kTileQ}, {1, 1, kTileK}}; }
  static constexpr int kSmemLimit = smem_limit(Config::kArch);

  static constexpr int kRows = kOfKeys ? kTileK : kTileQ;     // of the tile that stays
  static constexpr int kColumns = kOfKeys ? kTileQ : kTileK;  // of a tile that passes
  // Of tiles that pass: of the first tensor, and of the second. Kernels that add dQ up count both.
  static constexpr int kFirstStages = kAddsDq && Config::kStages == 2 ? 1 : 2;
  static constexpr int kStages = kAddsDq ? Config::kStages / 2 : Config::kStages;
  static constexpr Held kHeld = Config::kHeld;

  static constexpr int kWarps = Config::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kAddresses = 2;               // of copies, that a thread finds at a time
  static constexpr int kSharing = Config::kSharing;  // warps with the same rows
  static constexpr int kRowWarps = kWarps / kSharing;
  static constexpr int kWarpRows = kRows / kRowWarps;
  static constexpr int kBlocks = kWarpRows / 16;  // of the 16 rows of a matrix instruction
  static constexpr int kWarpColumns = kColumns / kSharing;
  static constexpr int kWarpDim = kHeadDim / kSharing;
  static constexpr int kGroups = (kTileQ + 63) / 64;
  // Kernels that add dQ up find again, in each step, what they are at (fused/place.h), where
  // registers do not hold it: with more than 32 x 32 scores of a warp, or with copies in the middle
  // of a step.
  static constexpr bool kFindsAgain =
      kAddsDq && (kBlocks * kWarpColumns > 64 || Config::kStages < 4);

  static_assert(sizeof(Element) == 2, "the kernels are for fp16 and bf16");
  static_assert(kSharing == 1 || kSharing == 2, "one or two warps have the same rows");
  static_assert(kStages == 1 || kStages == 2, "the main loop is written for one or two stages");
  static_assert(kRowWarps * kWarpRows == kRows && kBlocks * 16 == kWarpRows && kBlocks >= 1,
                "a warp has whole blocks of 16 rows");
  static_assert(64 % kWarpRows == 0, "the rows of a warp are in one group of 64");
  static_assert(kWarpColumns % 16 == 0 && kWarpDim % 16 == 0,
                "fragments of tiles that pass have 16 columns");
  static_assert(kColumns % 32 == 0 && kColumns <= 128, "masks are words of 32 columns");
  static_assert(kRowWarps < 16, "each set of warps with the same rows has a barrier");

  // Elements of a row in shared memory: chunks of 16 bytes are swizzled in groups of eight.
  static constexpr int kRowDim = (kHeadDim + 63) / 64 * 64;
  static constexpr int kStayElements = kRows * kRowDim;     // of a tensor that stays
  static constexpr int kPassElements = kColumns * kRowDim;  // of a tile that passes
  static constexpr int kFactors = kOfKeys ? 2 : 1;
  // With one stage of everything dQ of a step is computed before the next one's factors.
  static constexpr int kFactorTiles = kFirstStages == 1 ? 1 : kFactors;
  static constexpr int kFactorElements = kSharing == 1 && !kAddsDq ? 0 : kRows * kColumns;
};

// A part of a warp's columns, as if more warps had the same rows.
template <class Traits, int kParts>
struct PartTraits : Traits {
  static constexpr int kSharing = Traits::kSharing * kParts;
  static constexpr int kWarpColumns = Traits::kWarpColumns / kParts;
};

// What a block has in shared memory. Tensors that are held in registers pass through the memory of
// the stages and factors, and so does the result.
template <class Traits, class Geometry>
struct BackwardStorage {
  using Element = typename Traits::Element;
  static constexpr int kStay = Traits::kHeld == Held::kNone   ? 2
                               : Traits::kHeld == Held::kBoth ? 0
                                                              : 1;
  static constexpr int kStageElements =
      (Traits::kFirstStages + Traits::kStages) * Traits::kPassElements +
      Traits::kFactorTiles * Traits::kFactorElements;
  static constexpr int kHeldElements = (2 - kStay) * Traits::kStayElements;
  static constexpr int kSpareElements =
      kHeldElements > kStageElements ? kHeldElements : kStageElements;
  static constexpr int kElements = kStay * Traits::kStayElements + kSpareElements;
  static_assert(Traits::kFactors * Traits::kStayElements <= kElements,
                "the result passes through the same memory");

  alignas(128) Element tiles[kElements];
  // Of the queries that stay, or of two stages of those that pass: lse in log2 units, and delta.
  alignas(16) float2 terms[Traits::kOfKeys ? 2 * Traits::kColumns : Traits::kRows];
  alignas(16) typename Geometry::Shared geometry;
  // A copy of Work, where it would take too many registers.
  alignas(Traits::kFindsAgain
              ? 16
              : 1) char work[Traits::kFindsAgain ? sizeof(typename Geometry::Work) : 1];

  // Those that are held come first, where the stages are later.
  __device__ __forceinline__ Element* stay(int tensor) {
    constexpr int kOneHeld = Traits::kHeld == Held::kFirst ? 0 : 1;
    if constexpr (kStay == 1) {
      return tiles + (tensor == kOneHeld ? 0 : kSpareElements);
    }
    return tiles + (kStay == 0 ? 0 : kSpareElements) + tensor * Traits::kStayElements;
  }
  __device__ __forceinline__ Element* pass(int tensor, int stage) {
    return tiles + (Traits::kFirstStages * tensor + stage) * Traits::kPassElements;
  }
  __device__ __forceinline__ Element* factor(int i) {
    return tiles + (Traits::kFirstStages + Traits::kStages) * Traits::kPassElements +
           i * Traits::kFactorElements;
  }
};

}  // namespace sparse_fmha::sm80
