// Scores of the middle keys of chunks: the largest product with a query of a group.
//
// A warp reads keys from memory straight to registers, 16 bytes to a lane. mma.sync adds up
// products over any order of the head dim if rows and keys have the same one. So the four lanes
// that share a key read 16 neighboring bytes each, 32 numbers of a row, and these are the operands
// of two steps: lane t has depths 8t to 8t + 3 of them in the first step, 8t + 4 to 8t + 7 in the
// second. Queries lie in shared memory in the same order.
#pragma once

#include "sparse_fmha/core/hip_search.h"
#include "sparse_fmha/device/mma_tile.h"

namespace sparse_fmha::device {

// NaN if either is NaN.
__device__ __forceinline__ float larger_or_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

// Eight 16-bit numbers or four fp32 ones of a row from `column` on; zeros past its end, or if there
// is no row.
template <class Element>
__device__ __forceinline__ uint4 load_chunk(Element const* row, int column, int head_dim) {
  return row != nullptr && column < head_dim ? __ldg(reinterpret_cast<uint4 const*>(row + column))
                                             : uint4{0, 0, 0, 0};
}

// The key that candidate j is scored by, which is half j % 2 of chunk j / 2; nullptr if it has no
// key or there is no such candidate.
template <class Element>
__device__ __forceinline__ Element const* key_of(HipSearch const& p, HipItem const& item,
                                                 KeyChunk const* chunks, int32_t candidates,
                                                 int32_t j) {
  if (j >= candidates) {
    return nullptr;
  }
  KeyChunk const half = chunks[j / 2].half(j % 2, p.granule);
  return half.size() > 0 ? item.key<Element>(p, half.middle()) : nullptr;
}

template <class Element, int kDim>
struct HipScores {
  static constexpr int kSegments = kDim / 32;  // 64 bytes of a row
  static constexpr int kSets = 2;              // of 16 queries
  static constexpr int kTiles = 256 / kDim;    // of 8 keys, of a warp at a time
  static constexpr int kFragments = kSets * 2 * kSegments;
  static constexpr int kRows = 16 * kSets;
  static constexpr int kRowBytes = kFragments * 32 * sizeof(uint4);

  // Loads queries from `first` on, [fragment][lane]; called by all threads of a block.
  static __device__ __forceinline__ void load_rows(HipSearch const& p, HipItem const& item,
                                                   int32_t first, uint4* rows) {
    int32_t const last = p.rows(item.group) - 1;
    for (int i = threadIdx.x; i < kFragments * 32; i += blockDim.x) {
      int const lane = i % 32;
      int const segment = i / 32 % kSegments;
      int const eight = i / 32 / kSegments;
      // The last row takes the place of those that are missing.
      auto const* const row = item.query<Element>(p, min_int(last, first + 8 * eight + lane / 4));
      rows[i] = load_chunk(row, 32 * segment + lane % 4 * 8, p.head_dim);
    }
  }

  // Joins the scores of these rows to those of rows before them, if there are any; called by all
  // threads of a block.
  static __device__ __forceinline__ void join(HipSearch const& p, HipItem const& item,
                                              KeyChunk const* chunks, int32_t candidates,
                                              int32_t first, uint4 const* rows, float* scores) {
    int const lane = threadIdx.x % 32;
    int const step = blockDim.x / 32 * 8 * kTiles;
#pragma unroll 1
    for (int32_t at = threadIdx.x / 32 * 8 * kTiles; at < candidates; at += step) {
      uint4 keys[kTiles][kSegments];
      uint32_t exist[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        auto const* const key =
            key_of<Element>(p, item, chunks, candidates, at + 8 * tile + lane / 4);
        exist[tile] = __ballot_sync(kWholeWarp, key != nullptr);
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          keys[tile][s] = load_chunk(key, 32 * s + lane % 4 * 8, p.head_dim);
        }
      }
      float tops[2 * kTiles];
      multiply(rows + lane, keys, tops);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        bool const there = exist[i / 2] >> (lane % 4 * 8 + i % 2 * 4) & 1;
        tops[i] = there ? tops[i] : -INFINITY;
      }
      int const own = reduce(tops);
      int32_t const j = at + own / 2 * 8 + lane % 4 * 2 + own % 2;
      if (j < candidates && lane / 4 % (8 / (2 * kTiles)) == 0) {
        scores[j] = first == 0 ? tops[0] : larger_or_nan(scores[j], tops[0]);
      }
    }
  }

 private:
  // The largest products of keys 2t and 2t + 1 of each tile with rows g and g + 8 of all sets.
  static __device__ __forceinline__ void multiply(uint4 const* rows,
                                                  uint4 const (&keys)[kTiles][kSegments],
                                                  float (&tops)[2 * kTiles]) {
    using Mma = WarpMma<Element>;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      float sums[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        uint4 const a = rows[(set * 2 * kSegments + s) * 32];
        uint4 const b = rows[((set * 2 + 1) * kSegments + s) * 32];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float (&d)[4] = sums[tile];
          uint4 const& key = keys[tile][s];
          Mma::fma(d[0], d[1], d[2], d[3], a.x, b.x, a.y, b.y, key.x, key.y, d[0], d[1], d[2],
                   d[3]);
          Mma::fma(d[0], d[1], d[2], d[3], a.z, b.z, a.w, b.w, key.z, key.w, d[0], d[1], d[2],
                   d[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float const top = larger_or_nan(sums[i / 2][i % 2], sums[i / 2][2 + i % 2]);
        tops[i] = set == 0 ? top : larger_or_nan(tops[i], top);
      }
    }
  }

  // Reduces numbers over the eight lanes with the same t, each of which then has one of them in
  // tops[0]; returns which one. Lanes exchange halves of what they have, so few shuffles are
  // enough.
  static __device__ __forceinline__ int reduce(float (&tops)[2 * kTiles]) {
    int const lane = threadIdx.x % 32;
    int own = 0;
    int step = 16;
#pragma unroll
    for (int half = kTiles; half > 0; half /= 2) {
      bool const upper = lane & step;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        float const keep = upper ? tops[i + half] : tops[i];
        float const give = upper ? tops[i] : tops[i + half];
        tops[i] = larger_or_nan(keep, __shfl_xor_sync(kWholeWarp, give, step));
      }
      own += upper ? half : 0;
      step /= 2;
    }
#pragma unroll
    for (; step >= 4; step /= 2) {
      tops[0] = larger_or_nan(tops[0], __shfl_xor_sync(kWholeWarp, tops[0], step));
    }
    return own;
  }
};

// fp32, for which no matrix unit is precise enough. Lanes next to each other share a key; queries
// are read from memory.
template <int kDim>
struct HipScores<float, kDim> {
  static constexpr int kLanes = kDim / 32;  // of a key
  static constexpr int kStep = 4 * kLanes;  // numbers from one of a lane's chunks to the next
  static constexpr int kChunks = 8;         // of four numbers, of a lane
  static constexpr int kRows = 2048;        // all
  static constexpr int kRowBytes = 0;

  static __device__ __forceinline__ void load_rows(HipSearch const&, HipItem const&, int32_t,
                                                   uint4*) {}

  static __device__ __forceinline__ void join(HipSearch const& p, HipItem const& item,
                                              KeyChunk const* chunks, int32_t candidates,
                                              int32_t /*first*/, uint4 const* /*rows*/,
                                              float* scores) {
    int const part = threadIdx.x % kLanes * 4;
    int32_t const rows = p.rows(item.group);
    int const step = blockDim.x / kLanes;
#pragma unroll 1
    for (int32_t from = 0; from < candidates; from += step) {
      int32_t const j = from + static_cast<int32_t>(threadIdx.x) / kLanes;
      float const* const key = key_of<float>(p, item, chunks, candidates, j);
      uint4 numbers[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        numbers[c] = load_chunk(key, kStep * c + part, p.head_dim);
      }
      float top = -INFINITY;
#pragma unroll 1
      for (int32_t r = 0; r < rows; ++r) {
        auto const* const query = item.query<float>(p, r);
        float sum = 0;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          uint4 const x = load_chunk(query, kStep * c + part, p.head_dim);
          sum = fmaf(__uint_as_float(x.x), __uint_as_float(numbers[c].x), sum);
          sum = fmaf(__uint_as_float(x.y), __uint_as_float(numbers[c].y), sum);
          sum = fmaf(__uint_as_float(x.z), __uint_as_float(numbers[c].z), sum);
          sum = fmaf(__uint_as_float(x.w), __uint_as_float(numbers[c].w), sum);
        }
#pragma unroll
        for (int lane = 1; lane < kLanes; lane *= 2) {
          sum += __shfl_xor_sync(kWholeWarp, sum, lane);
        }
        top = larger_or_nan(top, sum);
      }
      if (part == 0 && j < candidates) {
        scores[j] = key != nullptr ? top : -INFINITY;
      }
    }
  }
};

}  // namespace sparse_fmha::device
