// Tokens on one axis, with lists of key blocks in device memory.
//
// A tile holds several boxes of keys, or part of one, so the matrix tile does not depend on the
// block size. Names are those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/bit_mask.h"
#include "sparse_fmha/planning/list_stages.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/launch_lists.h"
#include "sparse_fmha/sm80/geometry/query_tokens.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct Lists {
  using Element = typename Traits::Element;
  static constexpr int kPlaced = 16;                     // tiles that are placed at a time
  static constexpr int kSixteens = Traits::kTileK / 16;  // per tile; a box has one or more

  struct Params {
    BoxSizes sizes;
  };
  // Of two sets of tiles: the set in use and the next.
  struct Shared {
    int32_t sixteens[2 * kPlaced][kSixteens];  // the first token of 16 rows
    int32_t origins[2 * kPlaced][kSixteens];   // the first token of each box
    bool masked[2 * kPlaced];                  // whether some row may not see all of the tile
    bool whole[2 * kPlaced];                   // whether all its rows exist
  };
  struct Work {
    QueryTokens<Element> queries;
    Element const* k;  // of the head
    Element const* v;
    ListStream stream;
    int32_t tiles;
  };

  // Rows of a tile.
  struct Rows {
    Element const* base;
    int64_t stride;
    int32_t const* sixteens;
    int32_t length;
    bool all;  // rows exist
    __device__ __forceinline__ bool whole() const {
      return all && TokenAddress<Element>::is_short(stride);
    }
    template <int kRowsAtOnce>
    __device__ __forceinline__ Element const* at(int first, int further) const {
      static_assert(16 % kRowsAtOnce == 0 || kRowsAtOnce % 16 == 0, "16 rows are consecutive");
      // Where few are copied at once, it is the same 16 for all threads.
      constexpr bool kFew = 16 % kRowsAtOnce == 0;
      int const sixteen = kFew ? further / 16 : first / 16 + further / 16;
      int const row = kFew ? first + further % 16 : first % 16;
      return TokenAddress<Element>::of(base, stride, sixteens[sixteen] + row);
    }
    __device__ __forceinline__ Element const* operator()(int r) const {
      int32_t const token = sixteens[r / 16] + r % 16;
      return token < length ? base + token * stride : nullptr;
    }
  };

  KernelParams<Lists, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& s = params.sparsity;
    int32_t const first = tile.q_tile * Traits::kTileQ;
    int32_t const head_kv = tile.head / params.heads_per_kv;
    int64_t const row = tile.batch * s.batch_stride + tile.head * s.head_stride + first / s.block_q;
    ListStream const stream =
        list_stream(s, row, s.full.indices + row * s.full.width, BlockSparse::count(s.full, row));
    BoxSizes const& sizes = params.geometry.sizes;
    int32_t const boxes = stream.entries << sizes.log2_split;
    return {{params, tile, first, s.len_q},
            head_of<Element>(params.k, tile.batch, head_kv),
            head_of<Element>(params.v, tile.batch, head_kv),
            stream,
            (boxes + (1 << sizes.log2_boxes) - 1) >> sizes.log2_boxes};
  }
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work,
                                                        TensorView const& view) const {
    return work.queries.rows(view);
  }
  __device__ __forceinline__ int64_t out_row(Work const& work, int r) const {
    return work.queries.out_row(params, r);
  }

  __device__ __forceinline__ int tiles(Work const& work) const { return work.tiles; }
  // A thread reads the list entry of the box that has 16 rows.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced != 0) {
      return;
    }
    auto s = params.sparsity;
    s.block_kv = again(s.block_kv);
    BoxSizes const sizes = sizes_again();
    for (int n = thread_again(); n < kPlaced * kSixteens; n += Traits::kThreads) {  // whole warps
      int const tile = i + n / kSixteens;
      int const first_row = n % kSixteens * 16;
      int const part = first_row >> sizes.log2_box;
      int const row_in_box = first_row & ((1 << sizes.log2_box) - 1);
      ListBox const box = list_box(sizes, work.stream, tile, part);
      int32_t const origin = box_origin(s, sizes, box);
      bool masked = box.entry < work.stream.partials || !is_whole(s, box.block, work.queries.first);
      bool whole = origin + row_in_box + 16 <= s.len_kv;
      CUTE_UNROLL
      for (int step = 1; step < kSixteens; step *= 2) {  // those of a tile are neighboring lanes
        masked |= __shfl_xor_sync(0xffffffff, masked, step);
        whole &= __shfl_xor_sync(0xffffffff, whole, step);
      }
      int const place = tile % (2 * kPlaced);
      shared.sixteens[place][first_row / 16] = origin + row_in_box;
      if (row_in_box == 0) {
        shared.origins[place][part] = origin;
      }
      if (first_row == 0) {
        shared.masked[place] = masked;
        shared.whole[place] = whole;
      }
    }
  }
  __device__ __forceinline__ Rows keys(Work const& work, int i) const {
    return rows(work.k, params.k, i);
  }
  __device__ __forceinline__ Rows values(Work const& work, int i) const {
    return rows(work.v, params.v, i);
  }
  __device__ __forceinline__ void write_mask(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ bool needs(Work const& /*work*/, int /*i*/, int /*group*/) const {
    return true;
  }
  __device__ __forceinline__ bool is_masked(Work const& /*work*/, int i) const {
    return shared.masked[place_of(i)];
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Lists const& lists, Work const& work, int row)
        : lists_(lists), work_(work), row_(row) {}
    using Seen = ColumnBits<Traits::kTileK>;
    __device__ __forceinline__ Seen look_up(int i) const {
      auto const& s = lists_.params.sparsity;
      BoxSizes const sizes = lists_.sizes_again();
      int32_t const* const origins = lists_.shared.origins[place_of(i)];
      int32_t const first = i << sizes.log2_boxes;
      // The partial blocks come first, so their bitmasks are consecutive, too.
      int64_t const first_entry = first >> sizes.log2_split;
      uint32_t with_bits = 0;
      for (int part = 0; part < 1 << sizes.log2_boxes; ++part) {
        bool const partial = (first + part) >> sizes.log2_split < work_.stream.partials;
        with_bits |= uint32_t(partial && origins[part] != kAbsent) << part;
      }
      uint8_t const* const bits =
          work_.stream.bits + (with_bits == 0 ? 0 : first_entry * BlockSparse::bits_bytes(s));
      Seen seen;
      CUTE_UNROLL
      for (int word = 0; word < Seen::kWords; ++word) {
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          int32_t const query = work_.queries.first + row_ + 8 * r;
          seen.set(r, word,
                   seen_columns(s, sizes, origins, with_bits, bits, query % s.block_q,
                                BlockSparse::limit(s, query), word));
        }
      }
      return seen;
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

   private:
    Lists const& lists_;
    Work const& work_;
    int const row_;  // of the thread's first row in the query tile
  };

  static Params params_of(typename Mechanism::Params const& sparsity) {
    return {box_sizes(sparsity.block_kv, Traits::kTileK)};
  }
  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    launch_lists<Lists, Traits, Mechanism>(p, context);
  }

 private:
  static __device__ __forceinline__ int place_of(int i) { return again(i) % (2 * kPlaced); }
  __device__ __forceinline__ BoxSizes sizes_again() const {
    BoxSizes const& sizes = params.geometry.sizes;
    return {again(sizes.log2_box), again(sizes.log2_boxes), again(sizes.log2_split)};
  }
  __device__ __forceinline__ Rows rows(Element const* base, TensorView const& view, int i) const {
    int const place = place_of(i);
    return {base, again(view.axis_stride[kGridAxes - 1]), shared.sixteens[place],
            params.sparsity.len_kv, shared.whole[place]};
  }
};

}  // namespace sparse_fmha::sm80
