// The driver calls that host code looks up: tensor maps are encoded as units/tensor_map.h says.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "../units/tensor_map.h"
#include "errors.h"

namespace {

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    default:
      return 0;
  }
}

bool is_swizzle(CUtensorMapSwizzle swizzle) {
  return swizzle >= CU_TENSOR_MAP_SWIZZLE_NONE && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B;
}

// The demands of the driver's documentation on what is encoded.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      cuuint64_t const* dims, cuuint64_t const* strides, cuuint32_t const* box,
                      cuuint32_t const* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion /*promotion*/,
                      CUtensorMapFloatOOBfill fill) {
  emulator::TensorMap made = {};
  made.magic = emulator::kTensorMapMagic;
  made.base = static_cast<std::byte*>(data);
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = static_cast<uint8_t>(bytes_of(type));
  bool fits = made.element_bytes != 0 && rank >= 1 && rank <= emulator::kMaxRank &&
              reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && is_swizzle(swizzle) &&
              fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!fits) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  made.swizzle = static_cast<emulator::Swizzle>(swizzle);
  for (cuuint32_t i = 0; i < rank; ++i) {
    fits &= dims[i] >= 1 && dims[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 &&
            element_strides[i] >= 1 && element_strides[i] <= 8;
    made.dims[i] = dims[i];
    made.box[i] = static_cast<uint16_t>(box[i]);
    made.element_strides[i] = static_cast<uint8_t>(element_strides[i]);
    if (i > 0) {
      fits &= strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40;
      made.strides[i - 1] = strides[i - 1];
    }
  }
  uint32_t const row_bytes = box[0] * made.element_bytes;
  fits &= row_bytes % 16 == 0;
  fits &=
      made.swizzle == emulator::Swizzle::kNone || row_bytes <= emulator::swizzle_span(made.swizzle);
  if (!fits) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(char const* symbol, void** function,
                                                        unsigned /*version*/,
                                                        unsigned long long /*flags*/,
                                                        cudaDriverEntryPointQueryResult* result) {
  bool const found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
