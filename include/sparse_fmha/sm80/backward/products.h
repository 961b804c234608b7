// The matrix products of a warp in the backward kernels.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/mma_products.h"
#include "sparse_fmha/device/mma_tile.h"
#include "sparse_fmha/sm80/backward/fragments.h"
#include "sparse_fmha/sm80/backward/traits.h"

namespace sparse_fmha::sm80 {

// Sums of 16 * kBlocks rows and kColumns columns. Element i of [block][column / 8] is column 2 *
// (lane % 4) + i % 2 of row lane / 4 + 8 * (i / 2).
template <int kBlocks, int kColumns>
struct Sums {
  float at[kBlocks][kColumns / 8][4];

  __device__ __forceinline__ void clear() {
    visit([](float& x, int /*block*/, int /*i*/) { x = 0.f; });
  }
  // body(x, block, i), where i counts a block's elements as in device/accumulator.h.
  template <class Body>
  __device__ __forceinline__ void visit(Body const& body) {
    CUTE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      CUTE_UNROLL
      for (int i = 0; i < kColumns / 2; ++i) {
        body(at[block][i / 4][i % 4], block, i);
      }
    }
  }
  template <class Element>
  __device__ __forceinline__ uint32_t pair(int block, int n, int half) const {
    return rounded<Element>(at[block][n][2 * half], at[block][n][2 * half + 1]);
  }
};

template <int kDim, class Element>
__device__ __forceinline__ uint32_t address_of(Element const* tile, Chunk const& at) {
  return cute::cast_smem_ptr_to_uint(tile + swizzled<kDim>(at));
}

// Which rows and columns are a warp's.
template <class Traits>
struct WarpPart {
  int const lane;
  int const rows;     // which of the sets of rows
  int const columns;  // which part of the columns
  __device__ __forceinline__ WarpPart()
      : lane(threadIdx.x % 32),
        rows(__shfl_sync(0xffffffff, threadIdx.x / 32, 0) / Traits::kSharing),
        columns(__shfl_sync(0xffffffff, threadIdx.x / 32, 0) % Traits::kSharing) {}
  // Of a thread. What is computed from thread_again() takes no registers before.
  __device__ __forceinline__ explicit WarpPart(int thread)
      : lane(thread % 32),
        rows(thread / 32 / Traits::kSharing),
        columns(thread / 32 % Traits::kSharing) {}
  __device__ __forceinline__ WarpPart(int lane_, int rows_, int columns_)
      : lane(lane_), rows(rows_), columns(columns_) {}
  // The same part, whose addresses are computed after this.
  __device__ __forceinline__ WarpPart(WarpPart const& other, int lane_)
      : lane(lane_), rows(other.rows), columns(other.columns) {}
  __device__ __forceinline__ int first_row() const { return rows * Traits::kWarpRows; }
  // The first of a thread's two rows of a block.
  __device__ __forceinline__ int thread_row(int block) const {
    return first_row() + 16 * block + lane / 4;
  }
  // Waits for the warps with the same rows.
  __device__ __forceinline__ void sync() const {
    if constexpr (Traits::kSharing == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + rows), "n"(32 * Traits::kSharing) : "memory");
    }
  }
};

// The warp's rows of a tile in shared memory, as left factor.
template <class Traits, int kDim>
class LeftRows {
 public:
  __device__ __forceinline__ LeftRows(typename Traits::Element const* tile,
                                      WarpPart<Traits> const& warp)
      : address_(address_of<kDim>(tile + warp.first_row() * kDim, left_chunk(warp.lane))) {}
  __device__ __forceinline__ void get(int s, uint32_t (&to)[Traits::kBlocks][4]) const {
    CUTE_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) {
      load_four(advanced(address_, s) + b * 16 * kDim * 2, to[b]);
    }
  }

 private:
  uint32_t address_;
};

// Fragments of a left factor that stay in registers.
template <int kSteps, int kBlocks>
class HeldFragments {
 public:
  __device__ __forceinline__ void get(int s, uint32_t (&to)[kBlocks][4]) const {
    CUTE_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        to[b][r] = step_[s][b][r];
      }
    }
  }

 protected:
  uint32_t step_[kSteps][kBlocks][4];
};

// The rows of a tensor that stays, as left factor: in registers, or in shared memory.
template <class Traits, bool kHeld>
class StayingRows;

template <class Traits>
class StayingRows<Traits, false> {
 public:
  static constexpr int kUnroll = Traits::kAddsDq ? Traits::kHeadDim / 16 : 4;
  __device__ __forceinline__ StayingRows(typename Traits::Element const* tile,
                                         WarpPart<Traits> const& warp)
      : rows_(tile, warp) {}
  __device__ __forceinline__ void get(int s, uint32_t (&to)[Traits::kBlocks][4]) const {
    rows_.get(s, to);
  }

 private:
  LeftRows<Traits, Traits::kRowDim> rows_;
};

template <class Traits>
class StayingRows<Traits, true> : public HeldFragments<Traits::kHeadDim / 16, Traits::kBlocks> {
 public:
  static constexpr int kUnroll = Traits::kHeadDim / 16;
  __device__ __forceinline__ StayingRows(typename Traits::Element const* tile,
                                         WarpPart<Traits> const& warp) {
    StayingRows<Traits, false> const rows(tile, warp);
    CUTE_UNROLL
    for (int s = 0; s < Traits::kHeadDim / 16; ++s) {
      rows.get(s, this->step_[s]);
    }
  }
};

// Adds blocks of rows x 16 columns.
template <class Element, int kBlocks, int kColumns>
__device__ __forceinline__ void multiply_add(uint32_t const (&a)[kBlocks][4],
                                             uint32_t const (&b)[4], int n,
                                             Sums<kBlocks, kColumns>& sums) {
  using Mma = WarpMma<Element>;
  CUTE_UNROLL
  for (int block = 0; block < kBlocks; ++block) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float (&c)[4] = sums.at[block][n + half];
      uint32_t const(&x)[4] = a[block];
      Mma::fma(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], b[2 * half], b[2 * half + 1], c[0],
               c[1], c[2], c[3]);
    }
  }
}

// scores = rows that stay x the warp's rows of a tile that passes.
template <class Traits, class Rows>
__device__ __forceinline__ void multiply_rows(Rows const& rows,
                                              typename Traits::Element const* tile,
                                              WarpPart<Traits> const& warp,
                                              Sums<Traits::kBlocks, Traits::kWarpColumns>& scores) {
  scores.clear();
  uint32_t const address = address_of<Traits::kRowDim>(
      tile + warp.columns * Traits::kWarpColumns * Traits::kRowDim, right_chunk(warp.lane));
#pragma unroll Rows::kUnroll
  for (int s = 0; s < Traits::kHeadDim / 16; ++s) {
    uint32_t a[Traits::kBlocks][4];
    rows.get(s, a);
    CUTE_UNROLL
    for (int n = 0; n < Traits::kWarpColumns / 16; ++n) {
      uint32_t b[4];
      load_four(advanced(address, s) + n * 16 * Traits::kRowDim * 2, b);
      multiply_add<typename Traits::Element>(a, b, 2 * n, scores);
    }
  }
}

// A factor of the sums: weights or gradients of the scores, rounded to 16 bits. In registers the
// accumulator is the fragment; warps that share rows exchange it through shared memory. Between
// put() and get() these warps synchronize.
template <class Traits, bool kShared = (Traits::kSharing > 1)>
class Factor;

template <class Traits>
class Factor<Traits, false> : public HeldFragments<Traits::kColumns / 16, Traits::kBlocks> {
 public:
  using Element = typename Traits::Element;
  __device__ __forceinline__ Factor(Element* /*tile*/, WarpPart<Traits> const& /*warp*/) {}
  __device__ __forceinline__ void put(Sums<Traits::kBlocks, Traits::kWarpColumns> const& from) {
    CUTE_UNROLL
    for (int s = 0; s < Traits::kColumns / 16; ++s) {
      CUTE_UNROLL
      for (int b = 0; b < Traits::kBlocks; ++b) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          this->step_[s][b][r] = from.template pair<Element>(b, 2 * s + r / 2, r % 2);
        }
      }
    }
  }
};

template <class Traits>
class Factor<Traits, true> {
 public:
  using Element = typename Traits::Element;
  __device__ __forceinline__ Factor(Element* tile, WarpPart<Traits> const& warp)
      : tile_(tile), warp_(warp), rows_(tile, warp) {}
  __device__ __forceinline__ void put(Sums<Traits::kBlocks, Traits::kWarpColumns> const& from) {
    int const first_chunk = warp_.columns * (Traits::kWarpColumns / 8);
    CUTE_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) {
      CUTE_UNROLL
      for (int n = 0; n < Traits::kWarpColumns / 8; ++n) {
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          Element* const to =
              tile_ + swizzled<Traits::kColumns>({warp_.thread_row(b) + 8 * r, first_chunk + n});
          *reinterpret_cast<uint32_t*>(to + warp_.lane % 4 * 2) =
              from.template pair<Element>(b, n, r);
        }
      }
    }
  }
  __device__ __forceinline__ void get(int s, uint32_t (&to)[Traits::kBlocks][4]) const {
    rows_.get(s, to);
  }

 private:
  Element* const tile_;
  WarpPart<Traits> const& warp_;
  LeftRows<Traits, Traits::kColumns> const rows_;
};

// sums += factor x the warp's columns of a tile that passes.
template <class Traits>
__device__ __forceinline__ void multiply_columns(Factor<Traits> const& factor,
                                                 typename Traits::Element const* tile,
                                                 WarpPart<Traits> const& warp,
                                                 Sums<Traits::kBlocks, Traits::kWarpDim>& sums) {
  uint32_t const address = address_of<Traits::kRowDim>(tile, left_chunk(warp.lane));
  int const first = warp.columns * (Traits::kWarpDim / 16);
  CUTE_UNROLL
  for (int s = 0; s < Traits::kColumns / 16; ++s) {
    uint32_t a[Traits::kBlocks][4];
    factor.get(s, a);
    CUTE_UNROLL
    for (int n = 0; n < Traits::kWarpDim / 16; ++n) {
      uint32_t b[4];
      uint32_t const column = Traits::kWarpDim % 64 == 0 ? advanced(address, n) + first * 32
                                                         : advanced(address, first + n);
      load_four_transposed(column + s * 16 * Traits::kRowDim * 2, b);
      multiply_add<typename Traits::Element>(a, b, 2 * n, sums);
    }
  }
}

}  // namespace sparse_fmha::sm80
