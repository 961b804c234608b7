// Tokens on one axis, with lists of single keys and runs in device memory.
//
// A tile holds runs, or single keys whose rows are gathered. Names are those of
// geometry/contract.h.
#pragma once

#include "sparse_fmha/planning/stripe_stages.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/launch_lists.h"
#include "sparse_fmha/sm80/geometry/query_tokens.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct Stripes {
  using Element = typename Traits::Element;
  static constexpr int kWarpsOfKeys = Traits::kTileK / 32;
  // Tiles that are placed at a time: as many as there are threads for.
  static constexpr int kPlaced = Traits::kThreads < 2 * Traits::kTileK ? 1 : 2;
  static constexpr int kPlaces = 4;  // at least kPlaced + 2
  static_assert(Traits::kThreads >= Traits::kTileK, "a thread places a key");

  struct Params {
    BoxSizes sizes;
  };
  struct Shared {
    alignas(8) int32_t keys[kPlaces][Traits::kTileK];  // of each row; from len_kv on: no key
    bool whole[kPlaces][kWarpsOfKeys];                 // whether all rows see 32 consecutive ones
  };
  struct Work {
    QueryTokens<Element> queries;
    Element const* k;  // of the head
    Element const* v;
    StripeStream stream;
    int32_t limit;  // all rows see keys up to this one
    int32_t tiles;
  };
  struct Rows {
    Element const* base;
    int64_t stride;
    int32_t const* keys;
    int32_t length;
    bool all;  // rows are keys that exist
    __device__ __forceinline__ bool whole() const {
      return all && TokenAddress<Element>::is_short(stride);
    }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      return TokenAddress<Element>::of(base, stride, keys[first + further]);
    }
    __device__ __forceinline__ Element const* operator()(int r) const {
      int32_t const token = keys[r];
      return token < length ? base + token * stride : nullptr;
    }
  };

  KernelParams<Stripes, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& s = params.sparsity;
    int32_t const first = tile.q_tile * Traits::kTileQ;
    int32_t const head_kv = tile.head / params.heads_per_kv;
    int64_t const group =
        tile.batch * s.batch_stride + tile.head * s.head_stride + first / s.block_q;
    StripeStream const stream = stripe_stream(s, group);
    return {{params, tile, first, s.len_q},
            head_of<Element>(params.k, tile.batch, head_kv),
            head_of<Element>(params.v, tile.batch, head_kv),
            stream,
            Stripe::limit(s, first),
            stages_of(params.geometry.sizes, Traits::kTileK, stream)};
  }
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work,
                                                        TensorView const& view) const {
    return work.queries.rows(view);
  }
  __device__ __forceinline__ int64_t out_row(Work const& work, int r) const {
    return work.queries.out_row(params, r);
  }

  __device__ __forceinline__ int tiles(Work const& work) const { return work.tiles; }
  // A thread finds the key of a row. It waits for the list, so for several tiles at a time.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced != 0) {
      return;
    }
    auto const& s = params.sparsity;
    BoxSizes const& given = params.geometry.sizes;
    BoxSizes const sizes{again(given.log2_box), again(given.log2_boxes), again(given.log2_split)};
    int32_t const runs = run_stages(sizes, work.stream);
    int const n = thread_again();
    if (n >= kPlaced * Traits::kTileK) {  // whole warps
      return;
    }
    int const tile = i + n / Traits::kTileK;  // the same for whole warps
    int const row = n % Traits::kTileK;
    int32_t const key =
        tile < runs
            ? run_origin(s, sizes, work.stream, tile, row >> sizes.log2_box) +
                  (row & ((1 << sizes.log2_box) - 1))
            : column_key(s, listed_column(work.stream, (tile - runs) * Traits::kTileK + row));
    int const place = tile % kPlaces;
    shared.keys[place][row] = key;
    bool const whole = __all_sync(0xffffffff, key < work.limit);
    if (row % 32 == 0) {
      shared.whole[place][row / 32] = whole;
    }
  }
  __device__ __forceinline__ Rows keys(Work const& work, int i) const {
    return {work.k, again(params.k.axis_stride[kGridAxes - 1]), shared.keys[place_of(i)],
            params.sparsity.len_kv, !is_masked(work, i)};
  }
  __device__ __forceinline__ Rows values(Work const& work, int i) const {
    return {work.v, again(params.v.axis_stride[kGridAxes - 1]), shared.keys[place_of(i)],
            params.sparsity.len_kv, !is_masked(work, i)};
  }
  __device__ __forceinline__ void write_mask(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ bool needs(Work const& /*work*/, int /*i*/, int /*group*/) const {
    return true;
  }
  __device__ __forceinline__ bool is_masked(Work const& /*work*/, int i) const {
    int const place = place_of(i);
    bool whole = true;
    CUTE_UNROLL
    for (int w = 0; w < kWarpsOfKeys; ++w) {
      whole &= shared.whole[place][w];
    }
    return !whole;
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Stripes const& stripes, Work const& work, int row)
        : stripes_(stripes) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        limit_[r] = Stripe::limit(stripes.params.sparsity, work.queries.first + row + 8 * r);
      }
    }
    using Seen = SeenColumns;
    __device__ __forceinline__ Seen look_up(int i) const {
      int32_t const* const keys = stripes_.shared.keys[place_of(i)] + thread_again() % 4 * 2;
      Seen seen{};
      CUTE_UNROLL
      for (int n = 0; n < Traits::kTileK / 8; ++n) {
        int2 const pair = *reinterpret_cast<int2 const*>(keys + 8 * n);
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          seen.bits[r] |= uint32_t(pair.x < limit_[r]) << 2 * n;
          seen.bits[r] |= uint32_t(pair.y < limit_[r]) << (2 * n + 1);
        }
      }
      return seen;
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

   private:
    Stripes const& stripes_;
    int32_t limit_[kRowsPerThread];  // keys [0, limit) exist and are not after the row
  };

  static __device__ __forceinline__ int place_of(int i) { return again(i) % kPlaces; }

  static Params params_of(typename Mechanism::Params const& sparsity) {
    return {run_sizes(sparsity, Traits::kTileK)};
  }
  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    launch_lists<Stripes, Traits, Mechanism>(p, context);
  }
};

}  // namespace sparse_fmha::sm80
