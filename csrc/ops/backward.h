// Runs a backward pass: from a described problem and the gradients of its outputs to those of its
// inputs.
#pragma once

#include <optional>
#include <vector>

#include "problem.h"

namespace sparse_fmha {

// The arguments of a backward op in addition to those of its forward op.
struct BackwardArguments {
  Tensor dout;                 // like out; any strides
  std::optional<Tensor> dlse;  // like lse; nullopt: zero
  Tensor out;                  // as the forward pass returned them
  Tensor lse;
  bool need_dq;
  bool need_dkv;
  bool need_dbias;
  bool deterministic;                                   // whether runs must give equal bits
  std::optional<Tensor> skip_threshold = std::nullopt;  // of the forward pass
  std::optional<Tensor> skipped = std::nullopt;         // what it saved (skipped_tiles.h)
};

// The gradient of out, or out itself. Copied if kernels cannot read its layout.
TensorView like_out(char const* name, Tensor& t, FmhaProblem const& problem, Tensor const& q,
                    bool contiguous);

// lse or its gradient, contiguous.
float const* rows_of_q(char const* name, Tensor& t, Tensor const& q);

// A gradient like an input, or [size of its first dimension, 0] if it is not wanted.
Tensor new_gradient(Tensor const& like, bool wanted);

// Runs the registry's kernels for the problem's backward passes on q's device and its current
// stream. Returns dq, dk, dv and, for a problem with extra tokens, dextra_k and dextra_v:
// contiguous, in q's dtype. For a problem with a bias of keys its gradient comes last, in fp32
// [B, Hq, tokens], not summed over what the bias shares. [B, 0] for gradients that are not wanted.
std::vector<Tensor> run_backward(FmhaProblem& problem, Tensor const& q, Tensor const& k,
                                 Tensor const& v, std::optional<Tensor> const& extra_k,
                                 std::optional<Tensor> const& extra_v, BackwardArguments arguments);

}  // namespace sparse_fmha
