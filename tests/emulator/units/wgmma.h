// wgmma.mma_async: the products of a warpgroup's matrix instruction.
#pragma once

#include <cstdint>

#include "shared_memory.h"

namespace emulator {

inline constexpr int kWarpgroup = 128;  // threads

// A matrix in shared memory, as the 64-bit descriptor of an operand says. Offsets are in bytes.
struct MatrixDescriptor {
  uint32_t start;
  uint32_t leading;  // LBO
  uint32_t stride;   // SBO
  Swizzle swizzle;
};

// Throws Fault for a base offset other than 0, which is not emulated.
MatrixDescriptor read_descriptor(uint64_t bits);

enum class Major : uint8_t { kK, kMn };  // PTX's imm-trans: 0 or 1
enum class Element : uint8_t { kBFloat16, kFloat16 };

// Where element (mn, k) of an operand with 16-bit elements lies.
uint32_t element_address(MatrixDescriptor const& matrix, Major major, int mn, int k);

// Where entry i of a thread's accumulators lies in D, and half h of register i of a thread's A.
struct Place {
  int row;
  int column;
};
Place accumulator_place(int thread, int i);
Place a_register_place(int thread, int i, int half);

// An instruction m64nNk16 with 16-bit operands and float32 accumulators.
struct Wgmma {
  int n = 8;  // 8 to 256, a multiple of 8
  Element element = Element::kBFloat16;
  Major major_a = Major::kK;
  Major major_b = Major::kK;
  bool accumulates = true;  // scale-d; otherwise D is A.B alone
  int sign_a = 1;           // imm-scale-a and imm-scale-b: 1 or -1
  int sign_b = 1;
};

// The part of one of a warpgroup's four warps: rows 16 `warp` to 16 `warp` + 15 of A and D. `d`
// holds [32][n / 2], `a` [32][4].
void wgmma(Wgmma const& op, int warp, SharedMemory shared, uint64_t a, uint64_t b, float* d);
void wgmma(Wgmma const& op, int warp, SharedMemory shared, uint32_t const* a, uint64_t b, float* d);

// D += A.B with A of 64 x 16 and B of 16 x n. `d` holds [128][n / 2]: each thread's accumulators.
void wgmma(Wgmma const& op, SharedMemory shared, uint64_t a, uint64_t b, float* d);
// The same with A from registers: `a` holds [128][4], each register of two elements.
void wgmma(Wgmma const& op, SharedMemory shared, uint32_t const* a, uint64_t b, float* d);

}  // namespace emulator
