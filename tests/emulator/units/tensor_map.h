// Tensor maps (CUtensorMap) in an encoding of the emulator's own, and the copies that use them.
#pragma once

#include <array>
#include <cstdint>

#include "shared_memory.h"

namespace emulator {

inline constexpr int kMaxRank = 5;

inline constexpr uint64_t kTensorMapMagic = 0x70616d20726f736e;

// What cuTensorMapEncodeTiled() keeps. The innermost dimension comes first.
struct TensorMap {
  uint64_t magic;
  std::byte* base;
  std::array<uint64_t, kMaxRank> dims;            // in elements
  std::array<uint64_t, kMaxRank - 1> strides;     // in bytes, of the dimensions after the first
  std::array<uint16_t, kMaxRank> box;             // in elements, those left out included
  std::array<uint8_t, kMaxRank> element_strides;  // one element of so many is copied
  uint8_t rank;
  uint8_t element_bytes;
  Swizzle swizzle;
};
static_assert(sizeof(TensorMap) <= 128);

using Coordinates = std::array<int32_t, kMaxRank>;  // the innermost first; of `rank` entries

// Reads the 128 bytes of a CUtensorMap. Throws Fault where they are not this encoding.
TensorMap const& read_tensor_map(void const* bytes);

// The bytes of a tile in shared memory, those outside of the tensor included: what a load adds to
// an mbarrier's transferred bytes.
uint32_t tile_bytes(TensorMap const& map);

// cp.async.bulk.tensor.shared.global.tile: elements outside of the tensor become zero.
void load_tile(TensorMap const& map, Coordinates const& at, SharedMemory shared, uint32_t address);

// cp.async.bulk.tensor.global.shared.tile: elements outside of the tensor are left out.
void store_tile(TensorMap const& map, Coordinates const& at, SharedMemory shared, uint32_t address);

}  // namespace emulator
