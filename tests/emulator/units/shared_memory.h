// The shared memory of one thread block, addressed as in PTX's .shared state space.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emulator {

// What a kernel must not do, such as an access outside of memory.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct SharedMemory {
  std::byte* data;
  uint32_t size;  // in bytes

  // The bytes [address, address + bytes). Throws Fault if some are outside.
  std::byte* at(uint32_t address, uint32_t bytes) const {
    if (address > size || bytes > size - address) {
      throw Fault("shared memory has " + std::to_string(size) + " bytes; " + std::to_string(bytes) +
                  " at " + std::to_string(address) + " are not all inside");
    }
    return data + address;
  }
};

// How 16-byte chunks are permuted: chunk bits are XORed with address bits three places up.
enum class Swizzle : uint8_t { kNone, k32, k64, k128 };

// The address of a byte after the permutation.
constexpr uint32_t swizzled(Swizzle swizzle, uint32_t address) {
  uint32_t const bits = static_cast<uint32_t>(swizzle);
  uint32_t const mask = ((1u << bits) - 1) << 4;
  return address ^ ((address >> 3) & mask);
}

// The bytes of a row of the permutation, 16 without one.
constexpr uint32_t swizzle_span(Swizzle swizzle) { return 16u << static_cast<uint32_t>(swizzle); }

}  // namespace emulator
