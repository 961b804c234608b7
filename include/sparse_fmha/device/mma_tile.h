// Scores of a few rows with tiles of keys by mma.sync: rows stay in registers, keys go through
// shared memory by asynchronous copies. For kernels that only read the scores, with no second
// product to overlap.
//
// Registers of lane l (PTX ISA, mma.m16n8k16 and ldmatrix), with g = l / 4 and t = l % 4:
//   rows, register r:   row g + 8 * (r % 2), depths 2t + 8 * (r / 2) and the next
//   keys, register r:   key g, depths 2t + 8r and the next
//   scores, register r: row g + 8 * (r / 2), key 2t + r % 2
#pragma once

#include <cutlass/arch/memory_sm80.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include <type_traits>

#include "sparse_fmha/core/config.h"

namespace sparse_fmha::device {

template <class Element>
using WarpMma =
    std::conditional_t<std::is_same_v<Element, cutlass::half_t>, cute::SM80_16x8x16_F32F16F16F32_TN,
                       cute::SM80_16x8x16_F32BF16BF16F32_TN>;

inline constexpr int kMmaWarps = 4;
inline constexpr int kMmaThreads = 32 * kMmaWarps;
inline constexpr uint32_t kWholeWarp = 0xffffffff;

// Index of a 16-byte chunk of a row of kDim elements. Chunks are swizzled by the row, so the same
// chunk of eight rows is in 32 different banks: among eight chunks, or, in rows of 96, among four,
// where rows next to each other begin in different halves of a line of memory.
template <int kDim>
constexpr SPARSE_FMHA_HD int chunk_place(int row, int chunk) {
  static_assert(kDim % 64 == 0 || kDim == 96,
                "a row is whole lines of 128 bytes, or one and a half");
  int const by = kDim == 96 ? row / 2 % 4 : row % 8;
  return row * kDim + (chunk ^ by) * 8;
}

// Copies row r from from + r * stride to row r of `to`. Rows from `count` and columns from
// `head_dim` are zero. Called by all threads of the block; returns with the copies in flight.
template <int kDim, int kRows, class Element>
__device__ __forceinline__ void copy_rows(Element* to, Element const* from, int64_t stride,
                                          int32_t count, int32_t head_dim) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRowsAtOnce = kMmaThreads / kChunks;
  static_assert(sizeof(Element) == 2 && kRows % kRowsAtOnce == 0, "whole passes of 16-byte chunks");
  int const chunk = threadIdx.x % kChunks;
  int const first = threadIdx.x / kChunks;
  int32_t const last = chunk * 8 < head_dim ? count : 0;
  Element const* row = from + first * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    int const r = first + i * kRowsAtOnce;
    bool const there = r < last;
    // If the row does not exist nothing is read, but a valid address is still required.
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        to + chunk_place<kDim>(r, chunk), there ? row : from, there);
    row += kRowsAtOnce * stride;
  }
}

__device__ __forceinline__ void load_matrices(void const* row, uint32_t (&to)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(*static_cast<cute::uint128_t const*>(row), to[0], to[1], to[2],
                                to[3]);
}

// 16 rows of a tile, kDim deep.
template <int kDim>
struct MmaRows {
  uint32_t step[kDim / 16][4];

  template <class Element>
  __device__ __forceinline__ void load(Element const* tile, int first_row) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s) {
      // Lanes 0 to 15 address the rows of matrices 0 and 1, the others those of 2 and 3, 8 depths
      // later.
      load_matrices(tile + chunk_place<kDim>(first_row + lane % 16, 2 * s + lane / 16), step[s]);
    }
  }
  // Of a step. `lane` is for queries that stay in shared memory.
  __device__ __forceinline__ void get(int s, int /*lane*/, uint32_t (&to)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[r] = step[s][r];
    }
  }
  __device__ __forceinline__ void negate() {
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        step[s][r] ^= 0x80008000u;
      }
    }
  }
};

// Scores of two sets of 16 rows with 32 keys: [set][8 keys][register].
using MmaScores = float[2][4][4];

// Multiplies with 32 keys of a tile, starting at `first_key`.
template <int kDim, class Element>
__device__ __forceinline__ void multiply(MmaRows<kDim> const (&rows)[2], Element const* tile,
                                         int first_key, MmaScores& scores) {
  using Mma = WarpMma<Element>;
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int set = 0; set < 2; ++set) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scores[set][n][r] = 0;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kDim / 16; ++s) {
    uint32_t keys[2][4];  // per 16 keys: first 8, depths from 0 and from 8; then the last 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const key = first_key + 16 * half + lane / 16 * 8 + lane % 8;
      load_matrices(tile + chunk_place<kDim>(key, 2 * s + lane / 8 % 2), keys[half]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t const* const b = &keys[n / 2][n % 2 * 2];
#pragma unroll
      for (int set = 0; set < 2; ++set) {
        uint32_t const(&a)[4] = rows[set].step[s];
        float (&c)[4] = scores[set][n];
        Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2],
                 c[3]);
      }
    }
  }
}

}  // namespace sparse_fmha::device
