// The two matrix products of a warp, whose query rows are one or two row tiles of 16, with a tile
// of keys or values in shared memory. Both row tiles use each fragment of keys and values.
#pragma once

#include "sparse_fmha/device/mma_products.h"
#include "sparse_fmha/sm80/forward/traits.h"

namespace sparse_fmha::sm80 {

template <int kSize>
using Accumulator = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kSize>>{}));
template <class Traits>
using Scores = Accumulator<Traits::kTileK / 2>[Traits::kRowTiles];
template <class Traits>
using Output = Accumulator<Traits::kHeadDim / 2>[Traits::kRowTiles];

// Where a lane reads the rows of fragments of 16 x 16 elements. The swizzle of a chunk is an
// exclusive or with bits 4 to 6 of an address, so four addresses reach all chunks; in rows of 96
// elements it is one with bits 4 and 5.
template <int kRowDim>
class FragmentRows {
 public:
  // The lane reads from row `row` and chunk `chunk`, which is 0 or 1, of the first fragment.
  template <class Element>
  __device__ __forceinline__ FragmentRows(Element const* tile, int row, int chunk)
      : first_(cute::cast_smem_ptr_to_uint(tile + chunk_place<kRowDim>(row, chunk))) {}
  // Of the fragment `rows` rows and 16 * step columns further.
  __device__ __forceinline__ uint32_t at(int rows, int step) const {
    return (first_ ^ (step % kSteps * 32)) + step / kSteps * (kSteps * 32) + rows * kRowDim * 2;
  }

 private:
  static constexpr int kSteps = kRowDim == 96 ? 2 : 4;  // among which chunks are swizzled
  uint32_t first_;
};

// Calls use(j) for j = 0, 1, ... in order, and load(j) kAhead calls earlier.
template <int kCount, int kAhead, class Load, class Use>
__device__ __forceinline__ void load_ahead(Load const& load, Use const& use) {
  CUTE_UNROLL
  for (int j = -kAhead; j < kCount; ++j) {
    if (j + kAhead < kCount) {
      load(j + kAhead);
    }
    if (j >= 0) {
      use(j);
    }
  }
}

// A warp's queries: in registers, or in shared memory.
template <class Traits, bool kInRegisters = Traits::kQueriesInRegisters>
class Queries;

template <class Traits>
class Queries<Traits, false> {
 public:
  using Fragments = uint32_t[Traits::kRowTiles][4];
  // `first`: the warp's first row.
  __device__ __forceinline__ Queries(typename Traits::Element const* tile, int first)
      : rows_(tile, first + threadIdx.x % 16, threadIdx.x % 32 / 16) {}
  __device__ __forceinline__ void load(int step, Fragments& to) const {
    CUTE_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      load_four(rows_.at(16 * m, step), to[m]);
    }
  }
  __device__ __forceinline__ Fragments const& of(int /*step*/, Fragments const& loaded) const {
    return loaded;
  }

 private:
  FragmentRows<Traits::kRowDim> rows_;
};

template <class Traits>
class Queries<Traits, true> {
 public:
  using Fragments = uint32_t[Traits::kRowTiles][4];
  __device__ __forceinline__ Queries(typename Traits::Element const* tile, int first) {
    Queries<Traits, false> const rows(tile, first);
    CUTE_UNROLL
    for (int s = 0; s < Traits::kHeadDim / 16; ++s) {
      rows.load(s, step_[s]);
    }
  }
  __device__ __forceinline__ void load(int /*step*/, Fragments& /*to*/) const {}
  __device__ __forceinline__ Fragments const& of(int step, Fragments const& /*loaded*/) const {
    return step_[step];
  }

 private:
  Fragments step_[Traits::kHeadDim / 16];
};

// Fragments that are loaded before the first of them is used.
inline constexpr int kLoadsAhead = 2;

// scores = queries x keys.
template <class Traits>
__device__ __forceinline__ void multiply_keys(Queries<Traits> const& queries,
                                              typename Traits::Element const* keys,
                                              Scores<Traits>& scores) {
  constexpr int kPerStep = Traits::kTileK / 16;
  int const lane = threadIdx.x % 32;
  // Of the first 8 keys depths from 0 and from 8; then of the last 8.
  FragmentRows<Traits::kRowDim> const rows(keys, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  uint32_t a[2][Traits::kRowTiles][4];
  uint32_t b[kLoadsAhead + 1][4];
  CUTE_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    cute::clear(scores[m]);
  }
  load_ahead<Traits::kHeadDim / 16 * kPerStep, kLoadsAhead>(
      [&](int j) {
        if (j % kPerStep == 0) {
          queries.load(j / kPerStep, a[j / kPerStep % 2]);
        }
        load_four(rows.at(j % kPerStep * 16, j / kPerStep), b[j % (kLoadsAhead + 1)]);
      },
      [&](int j) {
        int const s = j / kPerStep;
        auto const& of_step = queries.of(s, a[s % 2]);
        CUTE_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          multiply_16<typename Traits::Element>(scores[m], j % kPerStep * 2, of_step[m],
                                                b[j % (kLoadsAhead + 1)]);
        }
      });
}

// output += weights x values.
template <class Traits>
__device__ __forceinline__ void multiply_values(Weights<Traits> const (&weights)[Traits::kRowTiles],
                                                typename Traits::Element const* values,
                                                Output<Traits>& output) {
  constexpr int kPerStep = Traits::kHeadDim / 16;
  int const lane = threadIdx.x % 32;
  // Of the first 8 columns keys from 0 and from 8; then of the last 8.
  FragmentRows<Traits::kRowDim> const rows(values, lane % 16, lane / 16);
  uint32_t b[kLoadsAhead + 1][4];
  load_ahead<Traits::kTileK / 16 * kPerStep, kLoadsAhead>(
      [&](int j) {
        load_four_transposed(rows.at(j / kPerStep * 16, j % kPerStep), b[j % (kLoadsAhead + 1)]);
      },
      [&](int j) {
        CUTE_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          multiply_16<typename Traits::Element>(
              output[m], j % kPerStep * 2, weights[m].step[j / kPerStep], b[j % (kLoadsAhead + 1)]);
        }
      });
}

}  // namespace sparse_fmha::sm80
