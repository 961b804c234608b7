// The compile-time shape of a dK/dV kernel: tiles, shared-memory layouts, matrix instructions.
//
// A thread block holds a tile of keys and values and loops over the query tiles that see it. Scores
// are computed transposed, keys by queries, so the weights in the accumulator become operand A of
// the products with dO and Q, and each warpgroup accumulates the gradients of its own 64 keys.
#pragma once

#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// What a consumer warpgroup accumulates for its 64 keys.
enum class Roles {
  kBoth,   // dK and dV; consumers have different keys
  kSplit,  // dV in the first consumer, dK in the second, for the same keys: both need too many
           // registers
};

// Which kernel computes dQ.
enum class QueryGradient {
  kOtherKernel,
  // This one, which adds each key tile's share to fp32 sums in memory:
  kByConsumers,  // each consumer computes as many columns
  kByWarpgroup,  // a warpgroup of its own does
};

template <class Config, QueryGradient kQueryGradient = QueryGradient::kOtherKernel>
struct DkvTraits {
  using Element = typename Config::Element;
  static constexpr int kHeadDim = (Config::kHeadDim + 63) / 64 * 64;  // columns in shared memory
  static constexpr int kScoreSteps = Config::kHeadDim / 16;  // of K.Q; later columns are zero
  static constexpr int kTileQ = Config::kTileQ;              // queries per step
  static constexpr int kTileK = Config::kTileK;              // keys per thread block
  static constexpr int kStages = Config::kStages;
  static constexpr Roles kRoles = kHeadDim > 128 ? Roles::kSplit : Roles::kBoth;
  static SPARSE_FMHA_HD TileShape tile_shape() { return {{1, 1, kTileQ}, {1, 1, kTileK}}; }

  static constexpr int kConsumers = kRoles == Roles::kSplit ? 2 : kTileK / 64;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr bool kAddsDq = kQueryGradient != QueryGradient::kOtherKernel;
  static constexpr bool kKeyBias = !kAddsDq;  // whether keys may have biases
  static constexpr bool kDqByConsumers = kQueryGradient == QueryGradient::kByConsumers;
  static constexpr bool kDqByWarpgroup = kQueryGradient == QueryGradient::kByWarpgroup;
  static constexpr int kThreads = kConsumerThreads + (kDqByWarpgroup ? 256 : 128);
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8 * (kThreads / 128);  // by lane of 128
  // Finding a box, or a list entry and what sees it, takes more producer registers than a
  // contiguous range of tokens does.
  static constexpr int kMoved = Config::Mechanism::kOnGrid || Config::Mechanism::kByLists ? 8 : 0;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 + 2 * kMoved : 32;
  static constexpr int kDqRegisters = kDqByWarpgroup ? 72 : 0;
  static constexpr int kConsumerRegisters =
      kConsumers == 2 ? (kRegisters - kProducerRegisters - kDqRegisters) / 2 / 8 * 8 : 160;
  // A thread block starts with the multiprocessor's registers divided equally among its threads, in
  // multiples of 8. A warpgroup that asks for more waits until others have released theirs.
  static_assert(kProducerRegisters + kDqRegisters + kConsumerRegisters * kConsumers <= kRegisters,
                "consumers would wait for registers for ever");

  static_assert(sizeof(Element) == 2, "the Hopper kernels are for fp16 and bf16");
  static_assert(Config::kHeadDim % 16 == 0 && Config::kHeadDim <= 256,
                "K.Q steps over 16 elements of the head");
  static_assert(kConsumers == 2 || kConsumers == 3, "two or three consumer warpgroups");
  static_assert(kRoles == Roles::kBoth || kTileK == 64, "split roles share 64 keys");
  static_assert(!kAddsDq || kRoles == Roles::kBoth, "split roles leave no registers to dQ");
  static_assert(!kAddsDq || kTileQ == 64, "dQ is accumulated by one warpgroup");
  static_assert(kTileQ % 16 == 0 && kTileQ <= 128, "P.dO steps over 16 queries");

  using RowMajorAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using TransposedAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
  using LayoutKeys = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileK>, cute::Int<kHeadDim>>{}));
  using LayoutRows = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // The same bytes as operand B of P.dO and dS.Q, [kHeadDim, kTileQ].
  using LayoutRowsT = decltype(cute::tile_to_shape(
      TransposedAtom{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileQ>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  // Keys and values as operand A of the scores: in registers where two more tiles of 64 x 64 fit.
  // From shared memory, both operands of a 64 x 64 product take all of its bandwidth.
  static constexpr bool kKeysInRegisters = kHeadDim == 64 && kConsumers == 2;
  static constexpr auto select_scores() {
    using Shape = cute::Shape<cute::_64, cute::Int<kTileQ>, cute::Int<kHeadDim>>;
    constexpr auto kMajor = cute::GMMA::Major::K;
    if constexpr (kKeysInRegisters) {
      return cute::GMMA::rs_op_selector<Element, Element, float, Shape, kMajor, kMajor>();
    } else {
      return cute::GMMA::ss_op_selector<Element, Element, float, Shape, kMajor, kMajor>();
    }
  }
  using MmaScores = decltype(cute::make_tiled_mma(select_scores()));
  using MmaGradient = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kHeadDim>, cute::Int<kTileQ>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(cute::size<1>(typename MmaScores::AtomShape_MNK{}) == kTileQ &&
                    cute::size<1>(typename MmaGradient::AtomShape_MNK{}) == kHeadDim,
                "one matrix instruction is as wide as the tile");
  // dQ = dS.K of a query tile, kDqColumns at a time. Gradients of scores lie in shared memory as
  // consumers have them, keys by queries, which is operand A with its rows contiguous; keys are
  // read as operand B.
  using LayoutGrads = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileK>, cute::Int<kTileQ>, cute::Int<kStages>>{}));
  using LayoutGradsT = decltype(cute::tile_to_shape(
      TransposedAtom{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kTileK>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using LayoutKeysT = decltype(cute::tile_to_shape(
      TransposedAtom{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileK>>{},
      cute::Step<cute::_2, cute::_1>{}));
  // Rows of the tile of dK or dV that 64 rows are stored from: slabs of their own, or all keys.
  static constexpr int kStoredRows = kAddsDq ? 64 : kTileK;
  static constexpr int kDqColumns = kDqByConsumers ? kHeadDim / kConsumers : 64;
  static constexpr int kDqWarps = kDqByConsumers ? kConsumerWarps : 4;
  static constexpr int kGradElements = kTileK * kTileQ;  // of a stage
  using MmaDq = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kDqColumns>, cute::Int<kTileK>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));
  // Weights in registers: the accumulator of K.Q has the register layout of operand A of the next
  // products.
  using Weights = decltype(cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                               cute::Int<kTileQ / 16>>>{}));

  static constexpr int kKeyElements = kTileK * kHeadDim;  // of a tile of keys or values
  static constexpr int kRowElements = kTileQ * kHeadDim;  // of a stage of queries or dO
  static constexpr int kSmemLimit = 227 * 1024;
};

}  // namespace sparse_fmha::sm90
