// Tokens on one axis, with lists of key blocks in device memory.
//
// A tile holds several boxes of keys, or part of one, so the matrix tile does not depend on the
// block size. Names are those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/bit_mask.h"
#include "sparse_fmha/planning/list_stages.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/run_kernel.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/query_tokens.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct Lists {
  using Element = typename Traits::Element;
  static constexpr int kPlaced = 32;                     // tiles that are placed at a time
  static constexpr int kMaxBoxes = Traits::kTileK / 16;  // per tile

  struct Params {
    BoxSizes sizes;
  };
  // Of two sets of tiles: the set in use and the next. The boxes of a tile are consecutive.
  struct Shared {
    int32_t origins[2 * kPlaced * kMaxBoxes];  // the first token of each box
    uint8_t masked[2 * kPlaced * kMaxBoxes];   // whether some row may not see all of it
  };
  struct Work {
    QueryTokens<Element> queries;
    Element const* k;  // of the head
    Element const* v;
    ListStream stream;
  };

  // Rows of a tile.
  struct Rows {
    Element const* base;
    int64_t stride;
    int32_t const* origins;
    int32_t log2_box;
    int32_t length;
    __device__ __forceinline__ Element const* operator()(int r) const {
      int32_t const token = origins[r >> log2_box] + (r & ((1 << log2_box) - 1));
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
    return {
        {params, tile, first, s.len_q},
        head_of<Element>(params.k, tile.batch, head_kv),
        head_of<Element>(params.v, tile.batch, head_kv),
        list_stream(s, row, s.full.indices + row * s.full.width, BlockSparse::count(s.full, row))};
  }
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work,
                                                        TensorView const& view) const {
    return work.queries.rows(view);
  }
  __device__ __forceinline__ int64_t out_row(Work const& work, int r) const {
    return work.queries.out_row(params, r);
  }

  __device__ __forceinline__ int tiles(Work const& work) const {
    BoxSizes const& sizes = params.geometry.sizes;
    int32_t const boxes = work.stream.entries << sizes.log2_split;
    return (boxes + (1 << sizes.log2_boxes) - 1) >> sizes.log2_boxes;
  }
  // A thread reads the list entry of a box.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % kPlaced != 0) {
      return;
    }
    auto const& s = params.sparsity;
    BoxSizes const& sizes = params.geometry.sizes;
    for (int n = threadIdx.x; n < kPlaced << sizes.log2_boxes; n += Traits::kThreads) {
      int const tile = i + (n >> sizes.log2_boxes);
      int const part = n & ((1 << sizes.log2_boxes) - 1);
      ListBox const box = list_box(sizes, work.stream, tile, part);
      bool const whole =
          box.entry >= work.stream.partials && is_whole(s, box.block, work.queries.first);
      shared.origins[first_box(tile) + part] = box_origin(s, sizes, box);
      shared.masked[first_box(tile) + part] = !whole;
    }
  }
  __device__ __forceinline__ Rows keys(Work const& work, int i) const {
    return rows(work.k, params.k, i);
  }
  __device__ __forceinline__ Rows values(Work const& work, int i) const {
    return rows(work.v, params.v, i);
  }
  __device__ __forceinline__ int64_t key_index(Work const& /*work*/, int i, int r) const {
    int32_t const log2_box = params.geometry.sizes.log2_box;
    int32_t const token =
        shared.origins[first_box(i) + (r >> log2_box)] + (r & ((1 << log2_box) - 1));
    return token < params.sparsity.len_kv ? token : -1;
  }
  __device__ __forceinline__ void write_mask(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ bool needs(Work const& work, int /*i*/, int group) const {
    return work.queries.first + 64 * group < work.queries.length;
  }
  __device__ __forceinline__ bool is_masked(Work const& /*work*/, int i) const {
    uint32_t masked = 0;
    for (int part = 0; part < 1 << params.geometry.sizes.log2_boxes; ++part) {
      masked |= shared.masked[first_box(i) + part];
    }
    return masked != 0;
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Lists const& lists, Work const& work, int row)
        : lists_(lists), work_(work), row_(row) {}
    using Seen = ColumnBits<Traits::kTileK>;
    __device__ __forceinline__ Seen look_up(int i) const {
      auto const& s = lists_.params.sparsity;
      BoxSizes const& sizes = lists_.params.geometry.sizes;
      int32_t const* const origins = lists_.shared.origins + lists_.first_box(i);
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

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    auto const& sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    if (sparsity.block_q % Traits::kTileQ == 0) {
      start(p, sparsity, context);
    } else {  // 64 rows have lists of their own
      Lists<typename Traits::template WithTileQ<64>, Mechanism>::start(p, sparsity, context);
    }
  }
  static void start(FmhaProblem const& p, typename Mechanism::Params const& sparsity,
                    ExecutionContext const& context) {
    KernelParams<Lists, Mechanism> params;
    params.geometry = {box_sizes(sparsity.block_kv, Traits::kTileK)};
    params.sparsity = sparsity;
    run_kernel<Traits>(params, p, ceil_div(sparsity.len_q, Traits::kTileQ), sparsity.len_kv,
                       context);
  }

 private:
  __device__ __forceinline__ int first_box(int i) const {
    return i % (2 * kPlaced) << params.geometry.sizes.log2_boxes;
  }
  __device__ __forceinline__ Rows rows(Element const* base, TensorView const& view, int i) const {
    return {base, view.axis_stride[kGridAxes - 1], shared.origins + first_box(i),
            params.geometry.sizes.log2_box, params.sparsity.len_kv};
  }
};

}  // namespace sparse_fmha::sm80
