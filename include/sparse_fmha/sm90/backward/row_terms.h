// The terms of query rows that kernels of the backward pass read.
#pragma once

namespace sparse_fmha::sm90 {

// What there is of a query row, as Gradients::row_terms has it.
struct alignas(16) RowTerms {
  float lse_log2;  // +inf where the row sees no key
  float delta;
  float unused[2];
};

}  // namespace sparse_fmha::sm90
