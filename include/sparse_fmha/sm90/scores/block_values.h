// Stores maxima or sums of blocks. A warp reduces a step's scores to eight numbers, one for each 16
// of its 16 x 128. They wait in shared memory until there are 16 steps of them. Then all consumers
// join them to blocks of the size that was asked for: until then, no warp waits for another one.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/scores/held.h"

namespace sparse_fmha::sm90 {

// Maxima or sums of blocks of 16 x 16, until there are enough of them to be stored together.
template <int kRows>
struct BlockValues {
  static constexpr int kSide = 16;
  static constexpr int kSteps = 16;
  float of[2][kRows / kSide][kSteps * kScoreTile / kSide];  // [buffer][rows][columns]
};

template <class Op, int kRows>
struct BlockWriter {
  using Values = BlockValues<kRows>;
  static constexpr int kConsumerThreads = kRows * 2;
  static constexpr int kGroups = kScoreTile / Values::kSide;  // of columns

  ScoreParams const& params;
  ScoreWork const& work;
  Values& values;
  int32_t step = 0;

  // The numbers of this lane for each group of columns, joined over the warp.
  __device__ __forceinline__ void put(float (&of)[kGroups]) {
    int const lane = threadIdx.x % 32;
    exchange<4>(of, lane, 16);
    exchange<2>(of, lane, 8);
    exchange<1>(of, lane, 4);
    float const value = reduce_quad(of[0], [](float a, float b) { return Op::join(a, b); });
    int const slot = step % Values::kSteps;
    int const warp = threadIdx.x / 32 - 4;  // of the consumers
    if (lane % 4 == 0) {
      values.of[step / Values::kSteps % 2][warp][slot * kGroups + lane / 4] = value;
    }
    ++step;
    if (slot == Values::kSteps - 1) {
      store(Values::kSteps);
    }
  }
  __device__ __forceinline__ void finish() {
    int const rest = step % Values::kSteps;
    if (rest > 0) {
      store(rest);
    }
    clear();
  }

 private:
  // Halves the groups of a lane: it gives away those that its partner keeps.
  template <int kKept>
  static __device__ __forceinline__ void exchange(float (&of)[kGroups], int lane, int distance) {
    bool const upper = (lane & distance) != 0;
    CUTE_UNROLL
    for (int i = 0; i < kKept; ++i) {
      float const given = upper ? of[i] : of[i + kKept];
      float const own = upper ? of[i + kKept] : of[i];
      of[i] = Op::join(own, __shfl_xor_sync(0xffffffff, given, distance));
    }
  }
  __device__ __forceinline__ int32_t rows() const { return kRows / params.block_q; }
  __device__ __forceinline__ int32_t all_columns() const {
    return (params.len_kv + params.block_kv - 1) / params.block_kv;
  }
  // Calls body(row, column, place) for the thread's share of the tile's blocks in these columns
  // that exist; row is within the tile.
  template <class Body>
  __device__ __forceinline__ void for_blocks(int32_t begin, int32_t end, Body body) const {
    int32_t const last = min(end, all_columns());
    int32_t const all_rows = (params.len_q + params.block_q - 1) / params.block_q;
    int32_t const first_row = work.held * rows();
    CUTE_NO_UNROLL
    for (int32_t row = 0; row < rows() && first_row + row < all_rows; ++row) {
      int64_t const place = (work.list(params) * all_rows + first_row + row) * all_columns();
      CUTE_NO_UNROLL
      for (int32_t i = begin + static_cast<int32_t>(threadIdx.x) - 128; i < last;
           i += kConsumerThreads) {
        body(row, i, place + i);
      }
    }
  }
  // Stores the blocks of the last `count` steps. The other buffer is filled meanwhile.
  __device__ __forceinline__ void store(int count) {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, 1);
    auto const& of = values.of[(step - 1) / Values::kSteps % 2];
    int32_t const first = (step - count) * kGroups;  // group of columns
    int const high = params.block_q / Values::kSide;
    int const wide = params.block_kv / Values::kSide;
    for_blocks(first / wide, (first + count * kGroups) / wide,
               [&](int32_t row, int32_t column, int64_t place) {
                 float joined = Op::kNone;
                 CUTE_NO_UNROLL
                 for (int i = row * high; i < (row + 1) * high; ++i) {
#pragma unroll 4
                   for (int j = 0; j < wide; ++j) {
                     joined = Op::join(joined, of[i][column * wide - first + j]);
                   }
                 }
                 params.result[place] = Op::result(joined);
               });
  }
  // Blocks behind the last tile that any query of the held tile sees.
  __device__ __forceinline__ void clear() {
    for_blocks(work.end * kScoreTile / params.block_kv, all_columns(),
               [&](int32_t, int32_t, int64_t place) { params.result[place] = 0.f; });
  }
};

}  // namespace sparse_fmha::sm90
