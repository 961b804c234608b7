// Launches of kernels that use mma_tile.h.
#pragma once

#include <string>
#include <type_traits>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/mma_tile.h"

namespace sparse_fmha::device {

// Calls body(element, dim): an element of the dtype and, as an integral_constant, the smallest
// compiled depth that the head dim fits in.
template <class Body>
void with_mma_types(DataType dtype, int32_t head_dim, Body const& body) {
  auto with_dim = [&](auto element) {
    if (head_dim <= 64) {
      body(element, std::integral_constant<int, 64>());
    } else if (head_dim <= 128) {
      body(element, std::integral_constant<int, 128>());
    } else {
      body(element, std::integral_constant<int, 256>());
    }
  };
  if (dtype == DataType::kFloat16) {
    with_dim(cutlass::half_t());
  } else if (dtype == DataType::kBFloat16) {
    with_dim(cutlass::bfloat16_t());
  } else {
    throw std::runtime_error(
        std::string("sparse_fmha: dtype must be float16 or bfloat16 on CUDA, got ") +
        to_string(dtype));
  }
}

// `blocks` thread blocks in a one-dimensional grid.
inline unsigned grid_size(int64_t blocks, char const* of_what) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("sparse_fmha: thread blocks for ") + of_what +
                             " must be at most 2^31 - 1, got " + std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

template <class Params>
void launch_mma(void (*kernel)(Params), Params const& params, int64_t blocks, size_t smem_bytes,
                ExecutionContext const& context, char const* what) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(smem_bytes)),
             "raising the shared-memory limit");
  kernel<<<grid_size(blocks, what), kMmaThreads, smem_bytes,
           static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace sparse_fmha::device
