// The compile-time shape of a dK/dV kernel: tiles, shared-memory layouts, matrix instructions.
//
// A block keeps a tile of keys and values and goes over the query tiles that see it. Scores are
// computed transposed, keys by queries: weights then leave the accumulator as the first operand of
// the products with dO and Q, and each warpgroup has gradients of its own 64 keys.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm90/backward/config.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// What a consumer warpgroup accumulates of its 64 keys.
enum class Roles {
  kBoth,   // dK and dV, of keys of its own
  kSplit,  // the first consumer dV, the second dK, of the same keys: both are too many registers
};

template <class Config>
struct DkvTraits {
  using Element = typename Config::Element;
  static constexpr int kHeadDim = (Config::kHeadDim + 63) / 64 * 64;  // columns in shared memory
  static constexpr int kScoreSteps = Config::kHeadDim / 16;  // of K.Q; columns beyond are zero
  static constexpr int kTileQ = Config::kTileQ;              // queries of a step
  static constexpr int kTileK = Config::kTileK;              // keys of a block
  static constexpr int kStages = Config::kStages;
  static constexpr Roles kRoles = kHeadDim > 128 ? Roles::kSplit : Roles::kBoth;
  static SPARSE_FMHA_HD TileShape tile_shape() { return {{1, 1, kTileQ}, {1, 1, kTileK}}; }

  static constexpr int kConsumers = kRoles == Roles::kSplit ? 2 : kTileK / 64;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  // To find a box and what sees it takes a producer more registers than a run of tokens does.
  static constexpr int kMoved = Config::Mechanism::kOnGrid ? 8 : 0;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 + 2 * kMoved : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 - kMoved : 160;
  // A block begins with as many registers for each thread as a multiprocessor has for all of them,
  // in eights; who wants more waits for others to give some back.
  static_assert(kProducerRegisters * 128 + kConsumerRegisters * kConsumerThreads <=
                    65536 / kThreads / 8 * 8 * kThreads,
                "consumers would wait for registers for ever");

  static_assert(sizeof(Element) == 2, "the Hopper kernels are for fp16 and bf16");
  static_assert(Config::kHeadDim % 16 == 0 && Config::kHeadDim <= 256,
                "K.Q steps over 16 elements of the head");
  static_assert(kConsumers == 2 || kConsumers == 3, "two or three consumer warpgroups");
  static_assert(kRoles == Roles::kBoth || kTileK == 64, "split roles share 64 keys");
  static_assert(kTileQ % 16 == 0 && kTileQ <= 128, "P.dO steps over 16 queries");

  using RowMajorAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using TransposedAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
  using LayoutKeys = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileK>, cute::Int<kHeadDim>>{}));
  using LayoutRows = decltype(cute::tile_to_shape(
      RowMajorAtom{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // The same bytes as second operand of P.dO and dS.Q, [kHeadDim, kTileQ].
  using LayoutRowsT = decltype(cute::tile_to_shape(
      TransposedAtom{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileQ>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kTileQ>, cute::Int<kHeadDim>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::K>()));
  using MmaGradient = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kHeadDim>, cute::Int<kTileQ>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(cute::size<1>(typename MmaScores::AtomShape_MNK{}) == kTileQ &&
                    cute::size<1>(typename MmaGradient::AtomShape_MNK{}) == kHeadDim,
                "one matrix instruction is as wide as the tile");
  // Weights in registers: the accumulator of K.Q is, register for register, the first operand of
  // the products that follow.
  using Weights = decltype(cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                               cute::Int<kTileQ / 16>>>{}));

  static constexpr int kKeyElements = kTileK * kHeadDim;  // of a tile of keys, or of values
  static constexpr int kRowElements = kTileQ * kHeadDim;  // of a stage of queries, or of dO
  static constexpr int kSmemLimit = 227 * 1024;
};

}  // namespace sparse_fmha::sm90
