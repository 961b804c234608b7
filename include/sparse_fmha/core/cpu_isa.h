// The instruction set whose code CPU calls take.
#pragma once

#include <string>
#include <vector>

namespace sparse_fmha {

// Each has what those before it have.
enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best set of this CPU, or the one that calls are limited to.
CpuIsa cpu_isa();

// Names of the sets that this CPU has, from the lowest.
std::vector<std::string> cpu_isas();

// Limits all calls to a set and those before it, for tests and benchmarks. Returns the name of the
// one before. Throws std::invalid_argument if this CPU does not have it.
std::string set_cpu_isa(std::string const& name);

}  // namespace sparse_fmha
