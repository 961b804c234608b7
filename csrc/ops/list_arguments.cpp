#include "list_arguments.h"

#include <ostream>

#include "check.h"

namespace sparse_fmha {
namespace {

// A shape as text, made only if a message needs it; negative sizes mean any.
struct SizesText {
  std::vector<int64_t> const& sizes;
};

std::ostream& operator<<(std::ostream& out, SizesText const& text) {
  out << "[";
  for (size_t i = 0; i < text.sizes.size(); ++i) {
    out << (i == 0 ? "" : ", ");
    text.sizes[i] < 0 ? out << "any" : out << text.sizes[i];
  }
  return out << "]";
}

}  // namespace

void check_memory(char const* name, Tensor const& t, Tensor const& q) {
  require(on_one_device(t, q), name, " must be on q's device, ", device_of(q), ", got ",
          device_of(t));
  require(is_aligned(t, t.element_size()), name, " must start at a multiple of ", t.element_size(),
          " bytes, the size of its entries; copy it");
}

void check_list(char const* name, Tensor const& t, ScalarType dtype,
                std::vector<int64_t> const& sizes, Tensor const& q) {
  require(t.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype),
          ", got ", torch::headeronly::toString(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i];
  }
  require(fits, name, " must have shape ", SizesText{sizes}, ", got ", shape_of(t));
  check_memory(name, t, q);
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    require(t.size(i) <= 1 || t.numel() == 0 || t.stride(i) == stride, name,
            " must be contiguous, got stride ", t.stride(i), " in dimension ", i);
    stride *= t.size(i);
  }
}

BlockSparse::Lists lists_of(char const* name, Tensor const& counts, Tensor const& indices) {
  int64_t const width = indices.size(3);
  require(width <= INT32_MAX / 2, name, " must have lists of at most 2^30 entries, got ", width);
  return {static_cast<int32_t const*>(counts.data_ptr()),
          static_cast<int32_t const*>(indices.data_ptr()), static_cast<int32_t>(width)};
}

int64_t check_shared(char const* name, char const* dimension, int64_t size, int64_t whole) {
  require(size == 1 || size == whole, name, " must have 1 or q's ", whole, " in its ", dimension,
          " dimension, got ", size);
  return size;
}

}  // namespace sparse_fmha
