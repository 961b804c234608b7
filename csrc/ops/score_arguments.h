// Arguments that change the scores of pairs: their cap, the bias of keys, and the thresholds of
// rows.
#pragma once

#include <optional>

#include "problem.h"

namespace sparse_fmha {

// Adds a cap of scores, which must be finite and not negative; 0: none.
void add_softcap(FmhaProblem& problem, double softcap);

// Adds key_bias, fp32 [B or 1, Hq or 1, tokens of k], to a problem. This and the next function
// replace a tensor whose tokens are not contiguous by a copy, and the problem points into it.
void add_key_bias(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& key_bias);

// Adds row_threshold, fp32 [B or 1, Hq or 1, tokens of q], after key_bias, which it needs.
void add_row_threshold(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& row_threshold);

}  // namespace sparse_fmha
