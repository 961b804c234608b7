// Stands in for cuda.cpp where no GPU kernels are built.
#include <stdexcept>

#include "machine.h"

namespace sparse_fmha::bench {

std::unique_ptr<Machine> make_cuda() { throw std::runtime_error("built without GPU kernels"); }

}  // namespace sparse_fmha::bench
