// Lists of indices as arguments of ops.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "problem.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

// Checks a list, which kernels read as plain memory: its shape (negative: any), dtype, device and
// strides.
void check_list(char const* name, Tensor const& t, ScalarType dtype,
                std::vector<int64_t> const& sizes, Tensor const& q);

// Checks that a list is on q's device and aligned to the size of its entries.
void check_memory(char const* name, Tensor const& t, Tensor const& q);

// int32 lists [.., width] and their lengths, both checked.
BlockSparse::Lists lists_of(char const* name, Tensor const& counts, Tensor const& indices);

// `size`, which must be 1 or as many as q has.
int64_t check_shared(char const* name, char const* dimension, int64_t size, int64_t whole);

}  // namespace sparse_fmha
