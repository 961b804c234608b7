// Traits shared by the kernels that walk the key tiles of a query tile: tiles, shared-memory
// layouts, matrix instructions.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/scores_of_80_keys.h"

namespace sparse_fmha::sm90 {

// Config: a row of a kernel list.
template <class Config>
struct TileTraits {
  using Element = typename Config::Element;
  // Columns in shared memory: of queries and keys; of values and the output.
  static constexpr int kHeadDim = (Config::kHeadDim + 63) / 64 * 64;
  static constexpr int kValueDim = (Config::kValueDim + 63) / 64 * 64;
  static constexpr int kScoreSteps = Config::kHeadDim / 16;  // of Q.K; later columns are zero
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileK = Config::kTileK;
  static constexpr int kStages = Config::kStages;
  static constexpr bool kKeyBias = Config::kKeyBias;  // whether keys may have biases
  static constexpr bool kBiasOptional = false;        // or none, which is tested for each tile
  static constexpr int kBlocks = Config::kBlocks;     // thread blocks on a multiprocessor
  static SPARSE_FMHA_HD TileShape tile_shape() { return {{1, 1, kTileQ}, {1, 1, kTileK}}; }

  static_assert(sizeof(Element) == 2, "the Hopper kernels are for fp16 and bf16");
  static_assert(Config::kHeadDim % 16 == 0 && Config::kHeadDim <= 256,
                "Q.K steps over 16 elements of the head");
  static_assert(kTileQ == 64 || kTileQ == 128 || kTileQ == 192 || kTileQ == 256,
                "one to four consumer warpgroups of 64 rows each");
  static_assert(kTileK % 16 == 0 && kTileK <= 256, "P.V steps over 16 keys; a copy box has <= 256");

  static constexpr int kConsumers = kTileQ / 64;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerWarps = kConsumers * 4;

  // The 64K registers of a multiprocessor, moved from the producer to the consumers. All thread
  // blocks of it begin with as many registers a thread, a multiple of 8.
  static constexpr int kRegisters = 65536 / (kBlocks * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kRegisters % 16 == 8 || kConsumers == 1 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      ((kConsumers + 1) * kRegisters - kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kMovedRegisters = 8;  // taken from the consumers when rows are gathered

  using RowMajorAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using TransposedAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
  using LayoutQ = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kHeadDim>>{}));
  using LayoutK = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileK>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using LayoutOut = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kValueDim>>{}));
  // V as operand B of P.V, [kValueDim, kTileK]: the same bytes as a row-major [kTileK, kValueDim].
  using LayoutVt = decltype(cute::tile_to_shape(
      TransposedAtom{}, cute::Shape<cute::Int<kValueDim>, cute::Int<kTileK>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  // Each consumer warpgroup multiplies its own 64 rows.
  static constexpr auto select_scores() {
    using Shape = cute::Shape<cute::_64, cute::Int<kTileK>, cute::Int<kHeadDim>>;
    constexpr auto kMajor = cute::GMMA::Major::K;
    if constexpr (kTileK == 80) {
      return cute::SM90::GMMA::ScoresOf80Keys<Element, kMajor, kMajor>{};
    } else {
      return cute::GMMA::ss_op_selector<Element, Element, float, Shape, kMajor, kMajor>();
    }
  }
  using MmaQK = decltype(cute::make_tiled_mma(select_scores()));
  using MmaPV = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kValueDim>, cute::Int<kTileK>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static_assert(cute::size<1>(typename MmaQK::AtomShape_MNK{}) == kTileK &&
                    cute::size<1>(typename MmaPV::AtomShape_MNK{}) == kValueDim,
                "one matrix instruction is as wide as the tile");

  static constexpr int kBytesQ = kTileQ * kHeadDim * 2;
  static constexpr int kBytesOut = kTileQ * kValueDim * 2;
  static constexpr int kBytesK = kTileK * kHeadDim * 2;  // of one stage
  static constexpr int kBytesV = kTileK * kValueDim * 2;
  // Of the 228 KB of a multiprocessor, each thread block takes 1 KB more than it asks for.
  static constexpr int kSmemLimit = (228 / kBlocks - 1) * 1024;
};

}  // namespace sparse_fmha::sm90
