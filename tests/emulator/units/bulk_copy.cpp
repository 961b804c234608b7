#include "bulk_copy.h"

#include <cstring>

namespace emulator {
namespace {

void check(uint32_t address, void const* global, uint32_t bytes) {
  if (address % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw Fault("bulk copy: an address or a size is not a multiple of 16 bytes");
  }
}

}  // namespace

void bulk_load(SharedMemory shared, uint32_t address, void const* global, uint32_t bytes) {
  check(address, global, bytes);
  std::memcpy(shared.at(address, bytes), global, bytes);
}

void bulk_store(void* global, SharedMemory shared, uint32_t address, uint32_t bytes) {
  check(address, global, bytes);
  std::memcpy(global, shared.at(address, bytes), bytes);
}

void bulk_add_f32(void* global, SharedMemory shared, uint32_t address, uint32_t bytes) {
  check(address, global, bytes);
  std::byte const* const from = shared.at(address, bytes);
  std::byte* const to = static_cast<std::byte*>(global);
  for (uint32_t at = 0; at < bytes; at += sizeof(float)) {
    float sum = 0;
    float term = 0;
    std::memcpy(&sum, to + at, sizeof(float));
    std::memcpy(&term, from + at, sizeof(float));
    sum += term;
    std::memcpy(to + at, &sum, sizeof(float));
  }
}

}  // namespace emulator
