// The compile-time shape of a forward kernel.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/tile_config.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

// How consumer warpgroups share the matrix unit: in turns, so that one's softmax always overlaps
// the other's products, or whenever their data arrive.
enum class Schedule { kTurns, kFree };

// A row of the kernel list csrc/kernels/sm90_forward.def.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          Schedule Schedule_, Skipping Skipping_>
struct KernelConfig : TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr Schedule kSchedule = Schedule_;
  static constexpr Skipping kSkipping = Skipping_;
};

template <class Traits, class Geometry, class Mechanism>
struct Consumer;

template <class Config>
struct KernelTraits : TileTraits<Config> {
  using Tiles = TileTraits<Config>;
  static constexpr Pass kPass = Pass::kForward;
  static constexpr bool kVotes = Config::kSkipping == Skipping::kByThreshold;
  static_assert(!(kVotes && Tiles::kKeyBias), "no row skips tiles and has biases");
  static constexpr bool kTakeTurns = Config::kSchedule == Schedule::kTurns;
  static_assert(Tiles::kConsumerRegisters <= 240,
                "a thread has at most 240 registers: more thread blocks share the multiprocessor");
  // A consumer multiplies the next key tile before the current value tile.
  static constexpr bool kKeysAhead = true;

  template <class Geometry, class Mechanism>
  using ConsumerOf = Consumer<KernelTraits, Geometry, Mechanism>;

  // The number of tensors whose rows a query tile has in shared memory, the output tensor, and the
  // value kept per row: here the log-sum-exp, which is written.
  static constexpr int kQueryTensors = 1;
  using RowValue = float;
  static TensorView queries(FmhaProblem const& p, int /*i*/) { return p.q; }
  static TensorView output(FmhaProblem const& p) { return p.out; }
  static int32_t query_dim(FmhaProblem const& p, int /*i*/) { return p.head_dim; }
  static int32_t output_dim(FmhaProblem const& p) { return p.value_dim; }
  static RowValue* row_values(FmhaProblem const& p) { return p.lse; }

  // The output tile has its own shared memory if that fits. Otherwise it overwrites Q, and the next
  // Q is loaded after the output has been stored.
  static constexpr bool kOutputReplacesQ = Tiles::kBytesQ + Tiles::kBytesOut +
                                               Tiles::kStages * (Tiles::kBytesK + Tiles::kBytesV) +
                                               2048 >
                                           Tiles::kSmemLimit;
};

}  // namespace sparse_fmha::sm90
