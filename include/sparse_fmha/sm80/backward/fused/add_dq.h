// dQ of a query tile in a kernel of key tiles: the gradients of the scores, which all warps have
// put into shared memory, times the keys, added to fp32 sums in memory. The order of additions
// differs from run to run.
#pragma once

#include "sparse_fmha/device/query_sums.h"
#include "sparse_fmha/sm80/backward/dkv/block.h"

namespace sparse_fmha::sm80 {

// How many sets of queries dQ has, so that a warp, which has one set and a part of the columns,
// loads the fewest fragments: one for each 16 queries and one for each 16 columns, for every 16
// keys.
template <class Traits>
constexpr int query_sets_of_dq() {
  int best = 0;
  int fewest = Traits::kColumns + Traits::kHeadDim;
  for (int sets = 1; sets <= Traits::kWarps; sets *= 2) {
    int const parts = Traits::kWarps / sets;
    int const loads = Traits::kColumns / sets + Traits::kHeadDim / parts;
    bool const fits = Traits::kColumns % (16 * sets) == 0 && Traits::kHeadDim % (16 * parts) == 0;
    if (fits && loads <= fewest) {
      best = sets;
      fewest = loads;
    }
  }
  return best;
}

template <class Traits>
struct DqPart {
  static constexpr int kSets = query_sets_of_dq<Traits>();
  static_assert(kSets > 0, "fragments have 16 queries and 16 columns");
  static constexpr int kBlocks = Traits::kColumns / kSets / 16;
  static constexpr int kWarpDim = Traits::kHeadDim / (Traits::kWarps / kSets);
  static_assert(4 % kBlocks == 0, "queries of a warp are in one line of memory, and one tile");

  int const lane;
  int const block;   // the first of 16 queries
  int const column;  // the first one
  __device__ __forceinline__ explicit DqPart(int thread)
      : lane(thread % 32),
        block(thread / 32 % kSets * kBlocks),
        column(thread / (32 * kSets) * kWarpDim) {}
};

template <class Traits, class Geometry, class Mechanism>
class AddDq {
 public:
  using Tile = DkvBlock<Traits, Geometry, Mechanism>;
  using Part = DqPart<Traits>;
  using Product = Sums<Part::kBlocks, Part::kWarpDim>;

  __device__ __forceinline__ explicit AddDq(Tile const& tile) : tile_(tile) {}

  // Of step i.
  __device__ __forceinline__ void operator()(int i) const {
    Product product;
    multiply(i, Part(thread_again()), product);
    add(i, Part(thread_again()), product);
  }

 private:
  Tile const& tile_;

  // Gradients of scores are keys by queries, so both factors are transposed.
  __device__ __forceinline__ void multiply(int i, Part const& part, Product& product) const {
    using Element = typename Traits::Element;
    product.clear();
    uint32_t const left =
        advanced(address_of<Traits::kColumns>(tile_.smem.factor(i % Traits::kFactorTiles),
                                              right_chunk(part.lane)),
                 part.block);
    constexpr int kSteps = Part::kWarpDim / 16;
    constexpr bool kInLine = 4 % kSteps == 0 || kSteps % 4 == 0;  // of memory, if columns are
    uint32_t const first = address_of<Traits::kRowDim>(tile_.smem.stay(0), left_chunk(part.lane));
    uint32_t const right = kInLine ? advanced(first, part.column / 16) : first;
#pragma unroll 4
    for (int s = 0; s < Traits::kRows / 16; ++s) {
      uint32_t a[Part::kBlocks][4];
      CUTE_UNROLL
      for (int b = 0; b < Part::kBlocks; ++b) {
        load_four_transposed(advanced(left, b) + s * 16 * Traits::kColumns * 2, a[b]);
      }
      CUTE_UNROLL
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        uint32_t const column =
            kInLine ? advanced(right, n) : advanced(right, part.column / 16 + n);
        load_four_transposed(column + s * 16 * Traits::kRowDim * 2, b);
        multiply_add<Element>(a, b, 2 * n, product);
      }
    }
  }

  __device__ __forceinline__ void add(int i, Part const& part, Product const& product) const {
    constexpr int kGroup = 8 * kSumRows;  // numbers of eight columns
    auto const& params = tile_.params;
    typename Geometry::QueryPlace const at = tile_.geometry.query_place(tile_.work, i);
    int32_t const query = at.first + 16 * part.block;
    if (Traits::kColumns > kSumRows && query / kSumRows >= params.dq.tiles) {
      return;
    }
    int64_t const sums = (int64_t{at.head} * params.dq.tiles + query / kSumRows) * kSumRows;
    float* const to = params.dq.data + sums * params.head_dim + part.column / 8 * kGroup +
                      query % kSumRows / 16 * 128 + part.lane;
    CUTE_UNROLL
    for (int n = 0; n < Part::kWarpDim / 8; ++n) {
      if (part.column + 8 * n < params.head_dim) {
        CUTE_UNROLL
        for (int b = 0; b < Part::kBlocks; ++b) {
          CUTE_UNROLL
          for (int j = 0; j < 4; ++j) {
            asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to + n * kGroup + b * 128 + j * 32),
                         "f"(product.at[b][n][j]));
          }
        }
      }
    }
  }
};

}  // namespace sparse_fmha::sm80
