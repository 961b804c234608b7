// What runs a kernel and times it: the host, or one GPU.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::bench {

using Launch = std::function<void(ExecutionContext const&)>;

class Machine {
 public:
  virtual ~Machine() = default;

  // Memory that lives as long as the machine, its content repeating `pattern`.
  virtual void* allocate(int64_t bytes, std::vector<char> const& pattern) = 0;

  // Overwrites more memory than the last cache holds.
  virtual void flush() = 0;

  // Launches without waiting.
  virtual void run(Launch const& launch) = 0;

  // Seconds of one launch, under a profiler range of that name.
  virtual double time(char const* name, Launch const& launch) = 0;
};

std::unique_ptr<Machine> make_cpu();
std::unique_ptr<Machine> make_cuda();

}  // namespace sparse_fmha::bench
