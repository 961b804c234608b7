// Tiles against loops over coordinates, with CuTe's swizzles.
#include "../units/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <cute/swizzle.hpp>
#include <vector>

#include "../units/bulk_copy.h"
#include "check.h"

namespace unit_tests {
namespace {

using emulator::Coordinates;
using emulator::Fault;
using emulator::SharedMemory;
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*,
                            cuuint64_t const*, cuuint32_t const*, cuuint32_t const*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, 0, &result);
  return reinterpret_cast<Encode>(found);
}

struct Layout {
  cuuint64_t dims[4];
  cuuint64_t strides[3];  // bytes
  cuuint32_t box[4];
  cuuint32_t element_strides[4];
};

CUresult encode(CUtensorMap& map, Layout const& of, std::vector<uint16_t>& tensor,
                CUtensorMapSwizzle swizzle) {
  return encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, tensor.data(), of.dims, of.strides,
                   of.box, of.element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A tensor of distinct numbers, with room between its rows.
std::vector<uint16_t> numbers() {
  std::vector<uint16_t> tensor(4 * 5 * 7 * 48);
  for (size_t i = 0; i < tensor.size(); ++i) {
    tensor[i] = static_cast<uint16_t>(i + 1);
  }
  return tensor;
}

Layout layout(cuuint32_t row, cuuint32_t step) {
  return {{40, 6, 5, 4}, {96, 96 * 7, 96 * 7 * 5}, {row, 4 * step, 2, 1}, {1, step, 1, 1}};
}

template <class Swizzle>
void tiles_are_boxes(CUtensorMapSwizzle swizzle, cuuint32_t row, cuuint32_t step) {
  std::vector<uint16_t> tensor = numbers();
  Layout const of = layout(row, step);
  alignas(64) CUtensorMap map;
  CHECK(encode(map, of, tensor, swizzle) == CUDA_SUCCESS);
  emulator::TensorMap const& read = emulator::read_tensor_map(&map);
  CHECK(emulator::tile_bytes(read) == row * 4 * 2 * 2);
  std::vector<std::byte> memory(8192);
  SharedMemory const shared{memory.data(), 8192};
  constexpr uint32_t kStart = 1024 + 512;  // within a pattern of the 128-byte swizzle
  for (Coordinates const at : {Coordinates{0, 0, 0, 0}, Coordinates{16, 3, 4, 3},
                               Coordinates{-8, -2, -1, 1}, Coordinates{32, 5, 2, 4}}) {
    std::memset(memory.data(), 0xff, memory.size());
    emulator::load_tile(read, at, shared, kStart);
    std::vector<uint16_t> copy(tensor.size());
    std::vector<uint16_t> wanted_copy(tensor.size());
    for (uint32_t z = 0; z < 2; ++z) {
      for (uint32_t y = 0; y < 4; ++y) {
        for (uint32_t x = 0; x < row; ++x) {
          int64_t const places[] = {at[0] + x, at[1] + int64_t{y} * step, at[2] + z, at[3]};
          bool inside = true;
          int64_t index = places[0];
          for (int d = 0; d < 4; ++d) {
            inside &= places[d] >= 0 && places[d] < static_cast<int64_t>(of.dims[d]);
            index += d == 0 ? 0 : places[d] * static_cast<int64_t>(of.strides[d - 1]) / 2;
          }
          uint32_t const plain = kStart + ((z * 4 + y) * row + x) * 2;
          uint16_t value;
          std::memcpy(&value, memory.data() + Swizzle{}(plain), 2);
          CHECK(value == (inside ? tensor[index] : 0));
          if (inside) {
            wanted_copy[index] = tensor[index];
          }
        }
      }
    }
    // A store takes back what a load brought, and leaves the rest alone.
    CHECK(encode(map, of, copy, swizzle) == CUDA_SUCCESS);
    emulator::store_tile(emulator::read_tensor_map(&map), at, shared, kStart);
    CHECK(copy == wanted_copy);
    CHECK(encode(map, of, tensor, swizzle) == CUDA_SUCCESS);
  }
}

void invalid_maps_are_refused() {
  std::vector<uint16_t> tensor = numbers();
  alignas(64) CUtensorMap map;
  auto refused = [&](Layout const& of, CUtensorMapSwizzle swizzle) {
    return encode(map, of, tensor, swizzle) == CUDA_ERROR_INVALID_VALUE;
  };
  Layout of = layout(64, 1);
  CHECK(refused(of, CU_TENSOR_MAP_SWIZZLE_64B));  // rows are longer than the pattern
  of = layout(8, 1);
  of.strides[1] = 40;
  CHECK(refused(of, CU_TENSOR_MAP_SWIZZLE_NONE));
  of = layout(8, 1);
  of.box[1] = 257;
  CHECK(refused(of, CU_TENSOR_MAP_SWIZZLE_NONE));
  of = layout(4, 1);  // 8 bytes
  CHECK(refused(of, CU_TENSOR_MAP_SWIZZLE_NONE));
  std::memset(&map, 0, sizeof(map));
  CHECK(throws<Fault>([&] { emulator::read_tensor_map(&map); }));
}

void bulk_copies_check_and_add() {
  alignas(16) float global[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<std::byte> memory(64);
  SharedMemory const shared{memory.data(), 64};
  emulator::bulk_load(shared, 16, global, 32);
  emulator::bulk_add_f32(global, shared, 16, 16);
  CHECK(global[0] == 2 && global[3] == 8 && global[4] == 5);
  emulator::bulk_store(global, shared, 32, 16);
  CHECK(global[0] == 5 && global[3] == 8);
  CHECK(throws<Fault>([&] { emulator::bulk_load(shared, 48, global, 32); }));
  CHECK(throws<Fault>([&] { emulator::bulk_load(shared, 8, global, 16); }));
  CHECK(throws<Fault>([&] { emulator::bulk_load(shared, 0, global + 1, 16); }));
}

}  // namespace

void test_tensor_maps() {
  for (cuuint32_t step : {1u, 2u}) {
    tiles_are_boxes<cute::Swizzle<0, 4, 3>>(CU_TENSOR_MAP_SWIZZLE_NONE, 24, step);
    tiles_are_boxes<cute::Swizzle<1, 4, 3>>(CU_TENSOR_MAP_SWIZZLE_32B, 16, step);
    tiles_are_boxes<cute::Swizzle<2, 4, 3>>(CU_TENSOR_MAP_SWIZZLE_64B, 32, step);
    tiles_are_boxes<cute::Swizzle<3, 4, 3>>(CU_TENSOR_MAP_SWIZZLE_128B, 64, step);
  }
  invalid_maps_are_refused();
  bulk_copies_check_and_add();
}

}  // namespace unit_tests
