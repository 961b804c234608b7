// Where a lane's address points.
#pragma once

#include <string>

#include "decoder.h"
#include "values.h"

namespace emulator {

inline std::byte* shared_at(Block& block, uint32_t address, uint32_t bytes) {
  if (address % bytes != 0) {
    fault("shared address " + std::to_string(address) + " is not a multiple of " +
          std::to_string(bytes));
  }
  if (address < kReservedShared) {
    fault("shared address " + std::to_string(address) + " is in the reserved bytes");
  }
  return block.shared.at(address, bytes);
}

inline std::byte* host_at(uint64_t address, uint32_t bytes) {
  if (address % bytes != 0) {
    fault("address " + std::to_string(address) + " is not a multiple of " + std::to_string(bytes));
  }
  if (address < 4096) {
    fault("null pointer plus " + std::to_string(address));
  }
  return reinterpret_cast<std::byte*>(address);
}

template <bool kShared>
inline std::byte* data_at(Warp& warp, Instruction const& i, int32_t base, int lane,
                          uint32_t bytes) {
  uint64_t const address = warp.reg(base)[lane] + static_cast<uint64_t>(i.offset);
  return kShared ? shared_at(*warp.block, static_cast<uint32_t>(address), bytes)
                 : host_at(address, bytes);
}

// Notes a thread's write, wherever it was.
template <bool kShared>
inline void note_write(Warp& warp, Instruction const& i, int32_t base, int lane, uint32_t bytes) {
  Block& block = *warp.block;
  uint64_t address = warp.reg(base)[lane] + static_cast<uint64_t>(i.offset);
  if (kShared) {
    address = static_cast<uint32_t>(address);
  } else {
    address -= reinterpret_cast<uint64_t>(block.shared.data);
  }
  if (kShared || address < block.shared.size) {
    block.order.written(static_cast<uint32_t>(address), bytes,
                        warp.index * kLanes + static_cast<uint32_t>(lane));
  }
}

// Whether the opcode names shared memory.
inline bool in_shared(ptx::Statement const& statement) {
  return has_part(statement, "shared") || has_part(statement, "shared::cta");
}

// v2 and v4; 1 without either.
inline uint32_t vector_size(ptx::Statement const& statement) {
  return has_part(statement, "v2")   ? 2
         : has_part(statement, "v4") ? 4
         : has_part(statement, "v8") ? 8
                                     : 1;
}

}  // namespace emulator
