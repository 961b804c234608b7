// The CPU's rows of the kernel table: every mechanism and dtype, any head dim.
#pragma once

#include <vector>

#include "sparse_fmha/registry.h"

namespace sparse_fmha {

std::vector<KernelRow> cpu_kernel_rows();

}  // namespace sparse_fmha
