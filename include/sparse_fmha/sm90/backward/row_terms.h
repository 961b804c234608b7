// Per-row terms of the queries, as the backward kernels read them.
#pragma once

namespace sparse_fmha::sm90 {

// The terms of one query row, in the format of Gradients::row_terms.
struct alignas(16) RowTerms {
  float lse_log2;  // +inf if the row sees no key
  float delta;
  float unused[2];
};

}  // namespace sparse_fmha::sm90
