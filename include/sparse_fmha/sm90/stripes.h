// Tokens on one axis, whose keys are named by lists in device memory, one by one and in runs.
//
// A stage holds runs, which lanes of the producer's warp copy as boxes, or single keys, which the
// warp gathers. Consumers of different groups of queries have streams of stages of their own, as in
// lists.h. The names are explained in sequence.h.
#pragma once

#include "sparse_fmha/sm90/bit_mask.h"
#include "sparse_fmha/sm90/copy.h"
#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/gather.h"
#include "sparse_fmha/sm90/params.h"
#include "sparse_fmha/sm90/rows.h"
#include "sparse_fmha/sm90/smem.h"
#include "sparse_fmha/sm90/softmax.h"
#include "sparse_fmha/sm90/stripe_stages.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Stripes {
  using Element = typename Traits::Element;
  static constexpr int kWords = Traits::kTileK / 32;  // keys of a stage that a lane has
  static constexpr int32_t kGathered = -1;            // no first key of a run

  struct Params {
    CUtensorMap q;    // (D, Lq, Hq, B)
    CUtensorMap k;    // (D, Lkv, Hkv, B)
    CUtensorMap v;    // (D, Lkv, Hkv, B)
    CUtensorMap out;  // (D, Lq, Hq, B)
    RowSource k_rows;
    RowSource v_rows;
    float* lse;  // [B, Lq, Hq]
    int32_t heads_q;
    BoxSizes sizes;
  };

  static_assert(Traits::kConsumers == 2, "a query tile is 128 rows of one group or of two");
  static_assert(cute::Swizzle<3, 4, 3>{}(2 * typename Traits::LayoutK{}.layout_b()(13, 29, 0)) ==
                    2 * swizzled_place(13, 29, Traits::kTileK),
                "rows are gathered into the layout that tensor copies leave");
  static constexpr bool kSkips = false;
  static constexpr bool kWarpLoads = true;
  static constexpr bool kGathers = true;
  static constexpr bool kPassesOver = true;
  static constexpr bool kMasksSome = true;

  struct Work {
    WorkTile tile;
    int32_t head_kv;
    int32_t streams;  // which of the shared ones
    StreamStages stages;
  };
  struct Stage {
    int32_t masked;
    alignas(8) int32_t keys[Traits::kTileK];  // of each row; kAbsent: of none
  };
  struct Shared {
    Stage stages[Traits::kStages];
    StripeStream streams[2][3];  // of this work and the next
  };
  struct Source {
    int32_t place;   // of the stage, whose keys stay there until its values have been loaded
    int32_t origin;  // of the lane's box of a run; kGathered where there are single keys
    int32_t head;
    int32_t batch;
  };
  // One lane's part of a stage, as the producer sees it.
  struct StageBox {
    int32_t keys[kWords];  // of rows `lane`, `lane + 32`, ...
    int32_t origin;
    bool masked;  // whether any lane's is
  };
  struct Box {  // and as the consumers do
    bool masked;
    int32_t place;
  };

  KernelParams<Stripes, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ void init() const {}

  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& state) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    work.head_kv = tile.head / params.heads_per_kv;
    work.streams = static_cast<int32_t>(state.phase);
    auto& streams = shared.streams[state.phase];
    find_streams(params.sparsity, tile.batch, tile.head, tile.q_tile, streams);
    auto stages = [&](int i) {
      return stages_of(params.geometry.sizes, Traits::kTileK, streams[i]);
    };
    work.stages = {stages(0), stages(1), stages(2)};
  }

  // The stages of a query tile one after another. A stage's list entries are read while the one
  // before it is copied.
  class Boxes {
   public:
    int const count;
    __device__ __forceinline__ Boxes(Stripes const& stripes, Work const& work)
        : count(work.stages.total()), stripes_(stripes), work_(work) {
      fetch(0);
    }
    __device__ __forceinline__ StageBox next(int i) {
      StageBox const box = stripes_.complete(work_, stream_, found_);
      fetch(i + 1);
      return box;
    }

   private:
    __device__ __forceinline__ void fetch(int i) {
      if (i < count) {
        StreamPlace const place = stream_place(work_.stages, i);
        stream_ = place.stream;
        stripes_.find(stripes_.shared.streams[work_.streams][place.stream], place.index, found_);
      }
    }
    Stripes const& stripes_;
    Work const work_;
    int32_t stream_ = 0;
    StageBox found_{};
  };
  __device__ __forceinline__ Boxes boxes(Work const& work) const { return {*this, work}; }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const {
    return work.stages.total();
  }
  __device__ __forceinline__ ListWalk part_walk(Work const& work, int warpgroup) const {
    return list_walk(work.stages, warpgroup);
  }

  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* destination,
                                         Work const& work, int warpgroup) const {
    load_box<Traits::kHeadDim>(params.geometry.q, barrier, destination, Traits::kTileQ, kReadOnce,
                               first_token(work, warpgroup), work.tile.head, work.tile.batch);
  }
  __device__ __forceinline__ Source source(Work const& work, StageBox const& box,
                                           RingState<Traits::kStages> const& place) const {
    return {place.index, box.origin, work.head_kv, work.tile.batch};
  }
  // Bytes that tensor copies bring.
  __device__ __forceinline__ uint32_t copied_bytes(Source const& source) const {
    return source.origin == kGathered ? 0 : Traits::kBytesK;
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load(params.geometry.k, params.geometry.k_rows, barrier, destination, source);
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load(params.geometry.v, params.geometry.v_rows, barrier, destination, source);
  }

  // For the whole warp: what consumers have to know of the stage.
  __device__ __forceinline__ uint32_t publish(StageBox const& box,
                                              RingState<Traits::kStages> const& place,
                                              FullBarrier& /*barrier*/) const {
    Stage& stage = shared.stages[place.index];
    uint32_t const lane = threadIdx.x % 32;
    if (lane == 0) {
      stage.masked = box.masked;
    }
    CUTE_UNROLL
    for (int w = 0; w < kWords; ++w) {
      stage.keys[w * 32 + lane] = box.keys[w];
    }
    __syncwarp();
    compiler_fence();
    return 0;
  }
  // Consumers read this before they release the stage.
  __device__ __forceinline__ Box box(ListWalk const& /*walk*/, int /*i*/,
                                     RingState<Traits::kStages> const& place) const {
    compiler_fence();
    bool const masked = shared.stages[place.index].masked;
    __syncwarp();  // one lane releases the stage for all
    return {masked, place.index};
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Stripes const& stripes, int warpgroup)
        : stripes_(stripes), warpgroup_(warpgroup) {}
    __device__ __forceinline__ void set(Work const& work) {
      int32_t const query = stripes_.first_token(work, warpgroup_) + AccumulatorPosition().row;
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        limit_[r] = Stripe::limit(stripes_.params.sparsity, query + 8 * r);
      }
    }
    using Seen = ColumnBits<Traits::kTileK>;
    __device__ __forceinline__ Seen look_up(Work const& /*work*/, Box const& box) const {
      Stage const& stage = stripes_.shared.stages[box.place];
      int const first = AccumulatorPosition().column;
      Seen seen;
      CUTE_UNROLL
      for (int word = 0; word < kWords; ++word) {
        uint32_t bits[kRowsPerThread] = {};
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) {  // the thread's columns: two in each eight
          int const column = i / 2 * 8 + i % 2;
          int32_t const key = stage.keys[word * 32 + first + column];
          CUTE_UNROLL
          for (int r = 0; r < kRowsPerThread; ++r) {
            bits[r] |= uint32_t(key < limit_[r]) << (first + column);
          }
        }
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          seen.set(r, word, bits[r]);
        }
      }
      __syncwarp();  // one lane releases the stage for all
      return seen;
    }
    template <class Scores>
    __device__ __forceinline__ void apply(Scores& scores, Seen const& seen) const {
      seen.apply(scores);
    }

   private:
    Stripes const& stripes_;
    int const warpgroup_;
    int32_t limit_[kRowsPerThread];  // keys [0, limit) are there and not behind the row
  };

  __device__ __forceinline__ bool has_row(Work const& work, int warpgroup, int row) const {
    return first_token(work, warpgroup) + row < params.sparsity.len_q;
  }
  __device__ __forceinline__ void store_out(Element const* source, Work const& work,
                                            int warpgroup) const {
    store_rows<Traits::kHeadDim, Traits::kTileQ>(params.geometry.out, source,
                                                 first_token(work, warpgroup), work.tile);
  }
  __device__ __forceinline__ void store_lse(float const (&lse)[kRowsPerThread], Work const& work,
                                            int warpgroup, int row) const {
    auto const& g = params.geometry;
    store_rows_lse(g.lse, lse, first_token(work, warpgroup) + row, work.tile, params.sparsity.len_q,
                   g.heads_q);
  }

 private:
  __device__ __forceinline__ bool copies() const {
    return threadIdx.x % 32 < (1u << params.geometry.sizes.log2_boxes);
  }
  __device__ __forceinline__ int first_token(Work const& work, int warpgroup) const {
    return work.tile.q_tile * Traits::kTileQ + warpgroup * 64;
  }
  // A lane's list entries of a stage.
  __device__ __forceinline__ void find(StripeStream const& stream, int32_t stage,
                                       StageBox& found) const {
    auto const& sizes = params.geometry.sizes;
    int32_t const lane = threadIdx.x % 32;
    int32_t const runs = run_stages(sizes, stream);
    if (stage < runs) {
      found.origin = copies() ? run_origin(params.sparsity, sizes, stream, stage, lane) : kAbsent;
      return;
    }
    found.origin = kGathered;
    CUTE_UNROLL
    for (int w = 0; w < kWords; ++w) {
      int32_t const i = (stage - runs) * Traits::kTileK + w * 32 + lane;
      found.keys[w] = column_key(params.sparsity, stream, i);
    }
  }
  // With the keys of runs, and whether there is a mask.
  __device__ __forceinline__ StageBox complete(Work const& work, int32_t stream,
                                               StageBox box) const {
    int32_t const log2_box = params.geometry.sizes.log2_box;
    int32_t const limit = Stripe::limit(params.sparsity, first_token(work, stream == 2 ? 1 : 0));
    int32_t last = -1;
    CUTE_UNROLL
    for (int w = 0; w < kWords; ++w) {
      if (box.origin != kGathered) {
        int32_t const row = w * 32 + threadIdx.x % 32;
        int32_t const origin = __shfl_sync(0xffffffff, box.origin, row >> log2_box);
        box.keys[w] = origin + (row & ((1 << log2_box) - 1));
      }
      last = max(last, box.keys[w]);
    }
    box.masked = __any_sync(0xffffffff, last >= limit) != 0;
    return box;
  }
  // Each lane arrives once, besides the one that expects the bytes of tensor copies.
  __device__ __forceinline__ void load(CUtensorMap const& map, RowSource const& rows,
                                       FullBarrier& barrier, Element* destination,
                                       Source const& source) const {
    if (source.origin == kGathered) {
      gather_rows<Traits::kHeadDim, Traits::kTileK>(
          rows, source.batch, source.head, shared.stages[source.place].keys, destination, barrier);
      return;
    }
    if (copies()) {
      int const row = (threadIdx.x % 32) << params.geometry.sizes.log2_box;
      load_box<Traits::kHeadDim>(map, barrier, destination + row * 64, Traits::kTileK, kReadByMany,
                                 source.origin, source.head, source.batch);
    }
    barrier.arrive();
  }
};

}  // namespace sparse_fmha::sm90
