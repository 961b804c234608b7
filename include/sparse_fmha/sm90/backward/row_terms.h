// Per-row terms of the queries, as the backward kernels read them.
#pragma once

namespace sparse_fmha::sm90 {

// The terms of one query row, in the format of Gradients::row_terms.
struct alignas(16) RowTerms {
  float lse_log2;  // +inf if the row sees no key
  float delta;
  float scores;  // -lse_log2 / scale_log2: what products of scores start with to end as exponents
  float grads;   // -delta
};

}  // namespace sparse_fmha::sm90
