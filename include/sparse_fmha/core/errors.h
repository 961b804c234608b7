// Errors of the library are std::runtime_error, which is all that the stable ABI of PyTorch lets
// through. Python tells their types by how the text begins.
#pragma once

#include <stdexcept>
#include <string>

namespace sparse_fmha {

// Python raises NotImplementedError for errors that begin so (_ops/errors.py).
inline constexpr char const* kNotImplemented = "NotImplementedError: ";

// For a valid request that no kernel takes yet.
inline std::runtime_error not_implemented(std::string const& message) {
  return std::runtime_error(kNotImplemented + message);
}

}  // namespace sparse_fmha
