// The instruction set whose code CPU calls take.
#pragma once

#include <string>
#include <vector>

namespace sparse_fmha {

// Each has what those before it have.
enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAvx512Amx };

// The best set of this CPU, or the one that calls are limited to.
CpuIsa cpu_isa();

// Whether calls take the tile registers of AMX. Asks the kernel for them when it is first true of
// the set that calls take; without its permission the process has none.
bool takes_tiles();

// Names of the sets that this CPU and its kernel have, from the lowest.
std::vector<std::string> cpu_isas();

// Limits all calls to a set and those before it, for tests and benchmarks. Returns the name of the
// one before. Throws std::invalid_argument if this CPU does not have it.
std::string set_cpu_isa(std::string const& name);

}  // namespace sparse_fmha
