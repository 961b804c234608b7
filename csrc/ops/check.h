// Errors of the ops: std::runtime_error, which becomes a RuntimeError in Python.
#pragma once

#include <cstdint>
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

// `value`, which must be in a range inside that of int32.
inline int32_t int_from(int64_t least, int64_t most, char const* name, int64_t value) {
  require(value >= least && value <= most, name, " must be from ", least, " to ", most, ", got ",
          value);
  return static_cast<int32_t>(value);
}

}  // namespace sparse_fmha
