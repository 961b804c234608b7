// Products of a warp's queries with means of key blocks.
//
// A warp has a few octets of rows. An octet is eight tokens next to each other with one head, token
// g in the lanes 4g to 4g + 3. An operand of mma.sync is two octets, so the scores of a token with
// its heads are in one lane, and sums over a group's heads need no exchange.
//
// As in hip_scores.h, 16 bytes of a row, read by a lane, are its operands of two steps.
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include "sparse_fmha/core/ssa_choices.h"
#include "sparse_fmha/device/mma_tile.h"

namespace sparse_fmha::device {

inline constexpr int kSsaKeys = 16;  // whose scores a warp has at a time

// Scores of sets of two octets: [set][8 keys][2 * octet + key], of keys 2t and 2t + 1.
template <int kSets>
struct SsaScores {
  float sums[kSets][kSsaKeys / 8][4];

  __device__ __forceinline__ float& at(int octet, int eight, int i) {
    return sums[octet / 2][eight][octet % 2 * 2 + i];
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int i = 0; i < kSsaKeys / 2; ++i) {
        sums[set][i / 4][i % 4] *= factor;
      }
    }
  }
};

template <class Element, int kDim>
struct SsaTile {
  static constexpr int kKeys = kDim <= 128 ? 32 : 16;
  static constexpr int kOctets = kDim <= 128 ? 4 : 2;  // of a warp; 64 registers
  static constexpr int kNumbers = 16 / sizeof(Element);
  static constexpr int kChunks = kDim / kNumbers;  // of a row
  static constexpr int kPart = kKeys * kChunks;    // chunks of a part of the means
  using Scores = SsaScores<kOctets / 2>;

  // Copies the means of keys from `first` on, [part][8 keys][4 chunks][lane]; zeros past `count`
  // keys and past the head dim. Called by all threads; returns with the copies in flight.
  static __device__ __forceinline__ void copy(SsaChoices const& p, int32_t entry, int32_t head_kv,
                                              int32_t first, int32_t count, uint4* to) {
    constexpr unsigned kSegments = kChunks / 4;
    constexpr unsigned kSteps = kPart / 32;  // of a part, for a warp
    unsigned const lane = threadIdx.x % 32;
    unsigned const column = lane % 4 * kNumbers;
    int32_t const own_first = first + static_cast<int32_t>(lane / 4);
    auto const* const own = p.mean<Element>(0, entry, own_first, head_kv) + column;
    unsigned const steps = p.parts * kSteps;
#pragma unroll 1
    for (unsigned step = threadIdx.x / 32; step < steps; step += blockDim.x / 32) {
      unsigned const part = step / kSteps;
      unsigned const segment = step % kSegments * 4 * kNumbers;
      unsigned const key = step % kSteps / kSegments * 8;
      bool const there = own_first + static_cast<int32_t>(key) < count &&
                         column + segment < static_cast<unsigned>(p.head_dim);
      auto const* const from =
          own + part * p.means.batch_stride + key * p.means.axis_stride[kGridAxes - 1] + segment;
      // If the chunk does not exist nothing is read, but a valid address is still required.
      cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
          to + step * 32 + lane, there ? from : static_cast<Element const*>(p.means.data), there);
    }
  }
};

// The rows of a warp: `pointers` has a row of each octet for this lane's token, or nullptr, which
// is a row of zeros.
template <class Element, int kDim>
struct SsaRows {
  using Tile = SsaTile<Element, kDim>;
  static constexpr int kSegments = kDim / 32;  // four chunks
  static constexpr int kOctets = Tile::kOctets;

  uint4 chunks[kOctets][kSegments];

  __device__ __forceinline__ SsaRows(Element const* const (&pointers)[kOctets], int32_t head_dim) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        int const column = 32 * s + threadIdx.x % 4 * 8;
        bool const there = pointers[o] != nullptr && column < head_dim;
        chunks[o][s] =
            there ? __ldg(reinterpret_cast<uint4 const*>(pointers[o] + column)) : uint4{0, 0, 0, 0};
      }
    }
  }

  // With keys from `first` on of a tile.
  __device__ __forceinline__ void multiply(uint4 const* tile, int parts, int first,
                                           typename Tile::Scores& scores) const {
    using Mma = WarpMma<Element>;
    scores = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      uint4 const* const from =
          tile + part * Tile::kPart + first * Tile::kChunks + threadIdx.x % 32;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
#pragma unroll
        for (int eight = 0; eight < kSsaKeys / 8; ++eight) {
          uint4 const key = from[(eight * kSegments + s) * 32];
          // Products next to each other do not wait for each other.
#pragma unroll
          for (int set = 0; set < kOctets / 2; ++set) {
            uint4 const& a = chunks[2 * set][s];
            uint4 const& b = chunks[2 * set + 1][s];
            float (&d)[4] = scores.sums[set][eight];
            Mma::fma(d[0], d[1], d[2], d[3], a.x, b.x, a.y, b.y, key.x, key.y, d[0], d[1], d[2],
                     d[3]);
          }
#pragma unroll
          for (int set = 0; set < kOctets / 2; ++set) {
            uint4 const& a = chunks[2 * set][s];
            uint4 const& b = chunks[2 * set + 1][s];
            float (&d)[4] = scores.sums[set][eight];
            Mma::fma(d[0], d[1], d[2], d[3], a.z, b.z, a.w, b.w, key.z, key.w, d[0], d[1], d[2],
                     d[3]);
          }
        }
      }
    }
  }
};

// fp32, for which no matrix unit is precise enough. Queries are read from memory.
template <int kDim>
struct SsaRows<float, kDim> {
  using Tile = SsaTile<float, kDim>;
  static constexpr int kOctets = Tile::kOctets;

  float const* rows[kOctets];
  int32_t head_dim;

  __device__ __forceinline__ SsaRows(float const* const (&pointers)[kOctets], int32_t head_dim)
      : head_dim(head_dim) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      rows[o] = pointers[o];
    }
  }

  __device__ __forceinline__ void multiply(uint4 const* tile, int parts, int first,
                                           typename Tile::Scores& scores) const {
    scores = {};
    int const lane = threadIdx.x % 4;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      uint4 const* const from = tile + part * Tile::kPart + first * Tile::kChunks;
#pragma unroll 1
      for (int chunk = 0; 4 * chunk < head_dim; ++chunk) {
        uint4 const* const of_chunk = from + chunk / 4 * 32 + chunk % 4;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          uint4 const x = rows[o] != nullptr
                              ? __ldg(reinterpret_cast<uint4 const*>(rows[o] + 4 * chunk))
                              : uint4{0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < kSsaKeys / 4; ++i) {
            uint4 const key = of_chunk[i / 2 * 8 * Tile::kChunks + (2 * lane + i % 2) * 4];
            float& sum = scores.at(o, i / 2, i % 2);
            sum = fmaf(__uint_as_float(x.x), __uint_as_float(key.x), sum);
            sum = fmaf(__uint_as_float(x.y), __uint_as_float(key.y), sum);
            sum = fmaf(__uint_as_float(x.z), __uint_as_float(key.z), sum);
            sum = fmaf(__uint_as_float(x.w), __uint_as_float(key.w), sum);
          }
        }
      }
    }
  }
};

}  // namespace sparse_fmha::device
