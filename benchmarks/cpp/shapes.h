// The problems that a row of the kernel table is timed on.
#pragma once

#include <string>
#include <vector>

#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::bench {

struct Shape {
  int batch;
  int heads;
  int head_dim;
  Coord grid;         // of queries and of keys
  Coord window = {};  // of a neighborhood

  int64_t rows() const { return batch * volume(grid) * heads; }
  int64_t elements() const { return rows() * head_dim; }  // of each of q, k, v, out
};

std::vector<Shape> shapes_of(KernelInfo const& kernel);

Sparsity sparsity_of(KernelInfo const& kernel, Shape const& shape);

// Both matrix products over the visible pairs; a multiply-add counts two.
double useful_flops(KernelInfo const& kernel, Shape const& shape);

// b4_l8192_h16_d128
std::string to_string(Shape const& shape);

int64_t element_bytes(DataType dtype);

}  // namespace sparse_fmha::bench
