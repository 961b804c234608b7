// TMA descriptors, encoded without linking libcuda.
#pragma once

#include <cudaTypedefs.h>

#include <array>
#include <cstddef>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/cuda/check.h"

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

// One axis of a tensor map after the head dimension.
struct MapAxis {
  int64_t extent;
  int64_t stride;               // in elements of the tensor
  uint32_t box = 1;             // extent of the copied boxes
  uint32_t element_stride = 1;  // between the elements of a box, at most 8
};

// The rows of a tensor's boxes.
struct MapRows {
  CUtensorMapDataType type;
  int bytes;          // per element
  uint32_t elements;  // per row
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion promotion;
};

// A tensor (extent, axes...) that is read and written in boxes. Elements outside read as zero and
// are not written, so no padding is needed.
template <std::size_t kAxes>
CUtensorMap make_tensor_map(void* data, MapRows const& rows, int64_t extent,
                            std::array<MapAxis, kAxes> const& axes) {
  std::array<cuuint64_t, kAxes + 1> dims = {static_cast<cuuint64_t>(extent)};
  std::array<cuuint64_t, kAxes> strides;
  std::array<cuuint32_t, kAxes + 1> box = {rows.elements};
  std::array<cuuint32_t, kAxes + 1> element_strides = {1};
  for (std::size_t i = 0; i < kAxes; ++i) {
    dims[i + 1] = static_cast<cuuint64_t>(axes[i].extent);
    // An extent of one makes its stride irrelevant, but the encoder still requires a multiple of
    // 16.
    strides[i] = axes[i].extent == 1 ? 16 : static_cast<cuuint64_t>(axes[i].stride) * rows.bytes;
    box[i + 1] = axes[i].box * axes[i].element_stride;
    element_strides[i + 1] = axes[i].element_stride;
  }
  CUtensorMap map;
  check_cuda(tensor_map_encoder()(&map, rows.type, kAxes + 1, data, dims.data(), strides.data(),
                                  box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  rows.swizzle, rows.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
             "encoding a tensor map");
  return map;
}

// A 16-bit tensor in boxes whose rows are 64 elements of the head, with the 128-byte swizzle.
template <std::size_t kAxes>
CUtensorMap make_tensor_map(void* data, DataType dtype, int64_t head_dim,
                            std::array<MapAxis, kAxes> const& axes) {
  // L2 promotion beyond one row pays if the row's other half is read next.
  auto const promotion =
      head_dim > 64 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  auto const type = dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map<kAxes>(data, {type, 2, 64, CU_TENSOR_MAP_SWIZZLE_128B, promotion},
                                head_dim, axes);
}

// Gradients::row_terms, four numbers per row.
template <std::size_t kAxes>
CUtensorMap row_terms_map(float* data, std::array<MapAxis, kAxes> const& axes) {
  return make_tensor_map<kAxes>(data,
                                {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, 4, CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_NONE},
                                4, axes);
}

// The [B, L, H, D] tensor as (D, L, H, B), in boxes of `rows` tokens of one head.
inline CUtensorMap sequence_tensor_map(TensorView const& view, DataType dtype, int64_t length,
                                       int64_t heads, int64_t batch, int64_t head_dim,
                                       uint32_t rows) {
  return make_tensor_map<3>(view.data, dtype, head_dim,
                            {MapAxis{length, view.axis_stride[2], rows},
                             MapAxis{heads, view.head_stride}, MapAxis{batch, view.batch_stride}});
}

}  // namespace sparse_fmha
