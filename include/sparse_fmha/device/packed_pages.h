// Keys of packed sequences that are in pages: which exist, and copies without gaps.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse_fmha/core/packed.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

struct PagedSequences {
  int32_t const* k_len;   // [sequences], positions in use
  int32_t* pages_before;  // [sequences, page_stride], how many earlier pages exist
  int32_t page_stride;    // pages of a sequence, and two more
};

// Keys and values as [tokens, heads, D]: the problem's tensors, or copies of pages, in which the
// pages of a sequence that exist follow each other. Reading pages in place was slower: a stage
// takes several copies.
struct PackedKeys {
  TensorView k;
  TensorView v;
};

// Launches the kernel that fills in pages_before.
void count_pages(PackedTokens const& packed, PagedSequences const& paged,
                 ExecutionContext const& context);

// Launches the kernel that copies the pages. The result is in the context's memory.
PackedKeys copy_pages(FmhaProblem const& problem, PagedSequences const& paged,
                      ExecutionContext const& context);

}  // namespace sparse_fmha::device
