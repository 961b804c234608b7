#include "tensor_map.h"

#include <cstring>

namespace emulator {
namespace {

uint32_t copied(TensorMap const& map, int dim) {
  return (map.box[dim] + map.element_strides[dim] - 1u) / map.element_strides[dim];
}

// Calls row(global, valid, address) for each row of a tile: the address of its first element, in
// global memory only if `valid`, and before the swizzle in shared memory.
template <class Row>
void each_row(TensorMap const& map, Coordinates const& at, uint32_t address, Row const& row) {
  uint32_t const row_bytes = copied(map, 0) * map.element_bytes;
  uint32_t rows = 1;
  for (int d = 1; d < map.rank; ++d) {
    rows *= copied(map, d);
  }
  for (uint32_t r = 0; r < rows; ++r) {
    uint64_t offset = 0;  // addresses wrap around
    bool valid = true;
    uint32_t rest = r;
    for (int d = 1; d < map.rank; ++d) {
      int64_t const place =
          int64_t{at[d]} + int64_t{rest % copied(map, d)} * map.element_strides[d];
      rest /= copied(map, d);
      valid = valid && place >= 0 && place < static_cast<int64_t>(map.dims[d]);
      offset += static_cast<uint64_t>(place) * map.strides[d - 1];
    }
    row(valid ? map.base + offset : nullptr, address + r * row_bytes);
  }
}

// Calls copy(global, shared) for each element; global is null outside of the tensor.
template <class Copy>
void each_element(TensorMap const& map, Coordinates const& at, SharedMemory shared,
                  uint32_t address, Copy const& copy) {
  shared.at(address, tile_bytes(map));
  if (address % 128 != 0) {
    throw Fault("tensor map: a tile must start at a multiple of 128 bytes of shared memory");
  }
  uint32_t const elements = copied(map, 0);
  each_row(map, at, address, [&](std::byte* row, uint32_t start) {
    for (uint32_t i = 0; i < elements; ++i) {
      int64_t const place = int64_t{at[0]} + int64_t{i} * map.element_strides[0];
      bool const valid = row != nullptr && place >= 0 && place < static_cast<int64_t>(map.dims[0]);
      uint32_t const to = swizzled(map.swizzle, start + i * map.element_bytes);
      copy(valid ? row + place * map.element_bytes : nullptr, shared.at(to, map.element_bytes));
    }
  });
}

}  // namespace

TensorMap const& read_tensor_map(void const* bytes) {
  TensorMap const& map = *static_cast<TensorMap const*>(bytes);
  if (map.magic != kTensorMapMagic) {
    throw Fault("tensor map: not one that the emulator encoded");
  }
  return map;
}

uint32_t tile_bytes(TensorMap const& map) {
  uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) {
    bytes *= copied(map, d);
  }
  return bytes;
}

void load_tile(TensorMap const& map, Coordinates const& at, SharedMemory shared, uint32_t address) {
  each_element(map, at, shared, address, [&](std::byte const* global, std::byte* to) {
    if (global == nullptr) {
      std::memset(to, 0, map.element_bytes);
    } else {
      std::memcpy(to, global, map.element_bytes);
    }
  });
}

void store_tile(TensorMap const& map, Coordinates const& at, SharedMemory shared,
                uint32_t address) {
  each_element(map, at, shared, address, [&](std::byte* global, std::byte const* from) {
    if (global != nullptr) {
      std::memcpy(global, from, map.element_bytes);
    }
  });
}

}  // namespace emulator
