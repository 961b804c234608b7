// The compile-time shape of a dQ kernel.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct DqConsumer;

// Uses the forward pass's names: Q.K is also dO.V, and P.V is dS.K.
template <class Config>
struct DqTraits : TileTraits<Config> {
  using Tiles = TileTraits<Config>;
  static constexpr Pass kPass = Pass::kBackwardDq;
  static_assert(Tiles::kValueDim == Tiles::kHeadDim, "dO.V has the steps and tiles of Q.K");
  static constexpr bool kVotes = false;
  static constexpr bool kTakeTurns = false;
  static constexpr bool kKeyBias = true;
  static constexpr bool kBiasOptional = true;
  static constexpr int kMovedRegisters = Tiles::kHeadDim == 64 ? 8 : 16;
  // A stage of keys is in use until dS is known; its values are released earlier.
  static constexpr bool kKeysAhead = false;

  template <class Geometry, class Mechanism>
  using ConsumerOf = DqConsumer<DqTraits, Geometry, Mechanism>;

  // The queries and dO.
  static constexpr int kQueryTensors = 2;
  using RowValue = RowTerms const;
  static TensorView queries(FmhaProblem const& p, int i) { return i == 0 ? p.q : p.gradients->out; }
  static TensorView output(FmhaProblem const& p) { return p.gradients->q; }
  static int32_t query_dim(FmhaProblem const& p, int i) {
    return i == 0 ? p.head_dim : p.value_dim;
  }
  static int32_t output_dim(FmhaProblem const& p) { return p.head_dim; }
  static RowValue* row_values(FmhaProblem const& p) {
    return reinterpret_cast<RowValue*>(p.gradients->row_terms);
  }

  // The output tile has its own shared memory if that fits.
  static constexpr bool kOutputReplacesQ =
      3 * Tiles::kBytesQ + 2 * Tiles::kStages * Tiles::kBytesK + 12288 > Tiles::kSmemLimit;
};

}  // namespace sparse_fmha::sm90
