// Descriptors for the tensor copy engine (TMA), encoded without linking libcuda.
#pragma once

#include <cudaTypedefs.h>

#include <array>

#include "sparse_fmha/host/check.h"
#include "sparse_fmha/params.h"

namespace sparse_fmha {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static auto const encode = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                cudaEnableDefault, &found),
               "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("sparse_fmha: the CUDA driver lacks cuTensorMapEncodeTiled (12.0)");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(symbol);
  }();
  return encode;
}

// The [B, L, H, D] tensor as (D, L, H, B), read and written in boxes of 64 elements of D by `rows`
// tokens of one head, in the 128-byte swizzle. What lies outside reads as zero and is not written,
// so neither D nor L need be padded.
inline CUtensorMap sequence_tensor_map(TensorView const& view, DataType dtype, int64_t length,
                                       int64_t heads, int64_t batch, int64_t head_dim,
                                       uint32_t rows) {
  constexpr int kRank = 4;
  constexpr int kBytes = 2;
  // An extent of one leaves its stride free, but the encoder wants a multiple of 16 all the same.
  auto stride = [](int64_t extent, int64_t elements) -> cuuint64_t {
    return extent == 1 ? 16 : static_cast<cuuint64_t>(elements) * kBytes;
  };
  std::array<cuuint64_t, kRank> const dims = {
      static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(length),
      static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  std::array<cuuint64_t, kRank - 1> const strides = {stride(length, view.axis_stride[2]),
                                                     stride(heads, view.head_stride),
                                                     stride(batch, view.batch_stride)};
  std::array<cuuint32_t, kRank> const box = {64, rows, 1, 1};
  std::array<cuuint32_t, kRank> const element_strides = {1, 1, 1, 1};
  CUtensorMap map;
  check_cuda(tensor_map_encoder()(&map,
                                  dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                  kRank, view.data, dims.data(), strides.data(), box.data(),
                                  element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
             "encoding a tensor map");
  return map;
}

}  // namespace sparse_fmha
