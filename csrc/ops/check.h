// Errors of the ops: std::runtime_error, which becomes a RuntimeError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace sparse_fmha {

// The parts say which argument is wrong, its value, and what is allowed.
template <class... Parts>
void require(bool condition, Parts const&... parts) {
  if (!condition) {
    std::ostringstream message;
    message << "sparse_fmha: ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

}  // namespace sparse_fmha
