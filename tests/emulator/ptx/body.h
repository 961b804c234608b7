#pragma once

#include <string_view>

#include "kernel.h"

namespace emulator::ptx {

// Reads a kernel from its .entry at `at`, which is in line `line`, to the end of the text.
Kernel parse_kernel(std::string_view text, size_t at, int32_t line);

}  // namespace emulator::ptx
