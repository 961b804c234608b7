// The kernels and variables of a module, found without a look at the kernels' bodies.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "kernel.h"

namespace emulator::ptx {

class Text {
 public:
  explicit Text(std::string text);

  std::vector<std::string> kernels() const;
  bool has(std::string const& kernel) const { return kernels_.count(kernel) != 0; }
  std::vector<Variable> const& variables() const { return variables_; }
  // Throws std::runtime_error with the line of what it cannot read.
  Kernel parse(std::string const& kernel) const;

 private:
  struct Span {
    size_t begin, end;  // from .entry to the closing brace
    int32_t line;
  };
  std::string text_;
  std::map<std::string, Span> kernels_;
  std::vector<Variable> variables_;
};

}  // namespace emulator::ptx
