// The compile-time shape of a kernel for the gradient of q.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/tile_traits.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct DqConsumer;

// In the names of the forward pass: Q.K is also the product of the output's gradient and V, and P.V
// is the one of the scores' gradient and K.
template <class Config>
struct DqTraits : TileTraits<Config> {
  using Tiles = TileTraits<Config>;
  static constexpr Pass kPass = Pass::kBackwardDq;
  static constexpr bool kVotes = false;
  static constexpr bool kTakeTurns = false;
  static constexpr int kMovedRegisters = 16;
  // A stage of keys is in use until the scores' gradient is known, and so are values before.
  static constexpr bool kKeysAhead = false;

  template <class Geometry, class Mechanism>
  using ConsumerOf = DqConsumer<DqTraits, Geometry, Mechanism>;

  // Besides the queries the gradients of their outputs.
  static constexpr int kQueryTensors = 2;
  using RowValue = RowTerms const;
  static TensorView queries(FmhaProblem const& p, int i) { return i == 0 ? p.q : p.gradients->out; }
  static TensorView output(FmhaProblem const& p) { return p.gradients->q; }
  static RowValue* row_values(FmhaProblem const& p) {
    return reinterpret_cast<RowValue*>(p.gradients->row_terms);
  }

  // The tile that is stored has shared memory of its own where that fits.
  static constexpr bool kOutputReplacesQ =
      3 * Tiles::kBytesQ + 2 * Tiles::kStages * Tiles::kBytesK + 12288 > Tiles::kSmemLimit;
};

}  // namespace sparse_fmha::sm90
