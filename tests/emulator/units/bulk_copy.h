// cp.async.bulk and cp.reduce.async.bulk without a tensor map.
#pragma once

#include <cstdint>

#include "shared_memory.h"

namespace emulator {

// Addresses and sizes must be multiples of 16 bytes; otherwise Fault is thrown.
void bulk_load(SharedMemory shared, uint32_t address, void const* global, uint32_t bytes);
void bulk_store(void* global, SharedMemory shared, uint32_t address, uint32_t bytes);
// cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32
void bulk_add_f32(void* global, SharedMemory shared, uint32_t address, uint32_t bytes);

}  // namespace emulator
