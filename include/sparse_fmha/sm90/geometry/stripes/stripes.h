// Tokens on one axis, with lists of single keys and runs in device memory.
//
// A stage holds either runs, which lanes of the producer's warps copy as boxes, or single keys,
// whose rows four extra warps gather. With large heads, whose consumers need the registers, the
// producer's warps gather them. Consumers with different groups of queries have separate streams of
// stages, as in lists.h. Names are those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/bit_mask.h"
#include "sparse_fmha/device/look_through.h"
#include "sparse_fmha/planning/stripe_stages.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"
#include "sparse_fmha/sm90/geometry/query_rows.h"
#include "sparse_fmha/sm90/geometry/stripes/stage_boxes.h"
#include "sparse_fmha/sm90/geometry/stripes/stripe_rows.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Stripes {
  using Element = typename Traits::Element;
  static_assert(Traits::kValueDim == Traits::kHeadDim, "rows of this geometry have one width");
  static constexpr int kWords = Traits::kTileK / 32;  // keys of a stage per lane
  static constexpr int kGatherWarps = Traits::kHeadDim <= 128 ? 4 : 0;
  static constexpr int32_t kGathered = -1;  // marks single keys, not the start of a run

  struct Params {
    CUtensorMap q[Traits::kQueryTensors];  // (D, Lq, Hq, B)
    CUtensorMap k;                         // (D, Lkv, Hkv, B)
    CUtensorMap v;                         // (D, Lkv, Hkv, B)
    CUtensorMap out;                       // (D, Lq, Hq, B)
    RowSource k_rows;
    RowSource v_rows;
    typename Traits::RowValue* rows;  // [B, Lq, Hq]
    int32_t heads_q;
    BoxSizes sizes;
  };

  static_assert(Traits::kConsumers == 2, "a query tile is 128 rows of one group or of two");
  static_assert(cute::Swizzle<3, 4, 3>{}(2 * typename Traits::LayoutK{}.layout_b()(13, 29, 0)) ==
                    2 * swizzled_place(13, 29, Traits::kTileK),
                "rows are gathered into the layout that tensor copies leave");
  static constexpr StageUse kStageUse = StageUse::kStreams;
  static constexpr Loader kLoader = Loader::kAllLanesAndRows;
  static constexpr MaskFrom kMaskFrom = MaskFrom::kStage;
  static constexpr MaskedStages kMaskedStages = MaskedStages::kByWalk;
  // dQ of small heads has no registers for them: calls with thresholds take that of larger ones.
  static constexpr bool kRowThresholds = Traits::kHeadDim > 64 || !Traits::kBiasOptional;
  static constexpr bool kNotesSkipped = true;

  struct Work {
    WorkTile tile;
    int32_t head_kv;
    int32_t streams;  // index into Shared::streams
    StreamStages stages;
    WholeStages whole[3];  // of each stream
  };
  struct Stage {
    alignas(8) int32_t keys[Traits::kTileK];  // of each row; kAbsent: no key
  };
  struct Shared {
    Stage stages[2 * Traits::kStages];  // written while earlier stages are in use
    StripeStream streams[2][3];         // of this query tile and the next
  };
  struct Source {
    int32_t origin;  // of the lane's box of a run; kGathered for single keys
    int32_t head;
    int32_t batch;
    int32_t keys[kGatherWarps == 0 ? kWords : 1];  // these, if the producer's warps gather
  };
  // One lane's share of a stage, for the producer.
  struct StageBox {
    int32_t keys[kWords];  // of rows `lane`, `lane + 32`, ...; as listed until next()
    int32_t origin;
    bool masked;  // whether consumers may look up the keys
  };
  struct MaskPlace {  // and for the consumers
    int32_t place;
  };

  // Defined in launch.h.
  static void launch(FmhaProblem const& p, ExecutionContext const& context);

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

  // Called by the whole warp that hands out query tiles: finds the stages in which no row needs a
  // mask.
  __device__ __forceinline__ void look_through(Work& work, RingState<1> const& state) const {
    auto const& s = params.sparsity;
    CUTE_UNROLL
    for (int n = 0; n < 3; ++n) {
      StripeStream const& stream = shared.streams[state.phase][n];
      int32_t const limit = Stripe::limit(s, first_token(work, n == 2 ? 1 : 0));
      int32_t const runs = first_of_warp(
          stream.num_runs, [&](int32_t i) { return !is_whole_run(s, stream.runs[i], limit); });
      int32_t const columns = first_of_warp(stream.num_columns, [&](int32_t i) {
        return !is_whole_column(stream.columns[i], limit);
      });
      if (threadIdx.x % 32 == 0) {
        work.whole[n] = whole_stages(params.geometry.sizes, Traits::kTileK, stream, runs, columns);
      }
    }
  }

  using Boxes = StripeBoxes<Traits, Stripes>;
  __device__ __forceinline__ Boxes boxes(Work const& work) const { return {*this, work}; }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const {
    return work.stages.total();
  }
  // Which 64 query rows a consumer has.
  __device__ __forceinline__ int group(Work const& work, int warpgroup) const {
    return first_token(work, warpgroup) / 64;
  }
  __device__ __forceinline__ ListWalk part_walk(Work const& work, int warpgroup) const {
    return list_walk(work.stages, work.whole[0], warpgroup == 0 ? work.whole[1] : work.whole[2],
                     warpgroup);
  }

  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* destination,
                                         Work const& work, int warpgroup) const {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load_box<Traits::kHeadDim>(
          params.geometry.q[i], barrier, destination + i * Traits::kTileQ * Traits::kHeadDim,
          Traits::kTileQ, kReadOnce, first_token(work, warpgroup), work.tile.head, work.tile.batch);
    }
  }
  __device__ __forceinline__ Source source(Work const& work, StageBox const& box) const {
    Source source{box.origin, work.head_kv, work.tile.batch, {}};
    if constexpr (kGatherWarps == 0) {
      CUTE_UNROLL
      for (int w = 0; w < kWords; ++w) {
        source.keys[w] = box.keys[w];
      }
    }
    return source;
  }
  // Whether this lane copies a box of a stage of runs.
  __device__ __forceinline__ bool copies() const {
    return threadIdx.x % 32 < (1u << params.geometry.sizes.log2_boxes);
  }
  // Bytes of the TMA copies.
  __device__ __forceinline__ uint32_t copied_bytes(Source const& source, uint32_t of_stage) const {
    return source.origin == kGathered ? 0 : of_stage;
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load(params.geometry.k, params.geometry.k_rows, barrier, destination, source);
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load(params.geometry.v, params.geometry.v_rows, barrier, destination, source);
  }

  using Rows = StripeRows<Traits, Stripes>;
  __device__ __forceinline__ Rows rows(Work const& work, int part) const {
    return {*this, work, part};
  }

  static __device__ __forceinline__ int published_place(RingState<Traits::kStages> const& place) {
    return place.index + static_cast<int>(place.phase) * Traits::kStages;
  }
  // Called by the whole warp: writes what consumers need to know about the stage.
  __device__ __forceinline__ void publish(StageBox const& box,
                                          RingState<Traits::kStages> const& place) const {
    if (!box.masked) {
      return;
    }
    Stage& stage = shared.stages[published_place(place)];
    uint32_t const lane = threadIdx.x % 32;
    CUTE_UNROLL
    for (int w = 0; w < kWords; ++w) {
      stage.keys[w * 32 + lane] = box.keys[w];
    }
    __syncwarp();
    compiler_fence();
  }
  __device__ __forceinline__ int64_t key_index(Work const& /*work*/, StageBox const& box, int w,
                                               int /*column*/) const {
    return box.keys[w] < params.sparsity.len_kv ? box.keys[w] : -1;
  }
  // There are no bitmasks.
  __device__ __forceinline__ uint32_t copy_bits(StageBox const& /*box*/,
                                                RingState<Traits::kStages> const& /*place*/,
                                                FullBarrier& /*barrier*/) const {
    return 0;
  }
  __device__ __forceinline__ MaskPlace mask_place(ListWalk const& /*walk*/, int /*i*/,
                                                  RingState<Traits::kStages> const& place) const {
    return {published_place(place)};
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
    __device__ __forceinline__ Seen look_up(Work const& /*work*/, MaskPlace const& at) const {
      compiler_fence();
      Stage const& stage = stripes_.shared.stages[at.place];
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
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

   private:
    Stripes const& stripes_;
    int const warpgroup_;
    int32_t limit_[kRowsPerThread];  // keys [0, limit) exist and are not after the row
  };

  __device__ __forceinline__ bool has_row(Work const& work, int warpgroup, int row) const {
    return first_token(work, warpgroup) + row < params.sparsity.len_q;
  }
  __device__ __forceinline__ int32_t query(Work const& work, int warpgroup, int row) const {
    return min(first_token(work, warpgroup) + row, params.sparsity.len_q - 1);
  }
  __device__ __forceinline__ void store_out(Element const* source, Work const& work,
                                            int warpgroup) const {
    store_rows<Traits::kHeadDim, Traits::kTileQ>(params.geometry.out, source,
                                                 first_token(work, warpgroup), work.tile);
  }
  template <class Body>
  __device__ __forceinline__ void visit_rows(Work const& work, int warpgroup, int row,
                                             Body const& body) const {
    auto const& g = params.geometry;
    visit_sequence_rows(g.rows, first_token(work, warpgroup) + row, work.tile,
                        params.sparsity.len_q, g.heads_q, body);
  }

 private:
  __device__ __forceinline__ int first_token(Work const& work, int warpgroup) const {
    return work.tile.q_tile * Traits::kTileQ + warpgroup * 64;
  }
  __device__ __forceinline__ void load(CUtensorMap const& map, RowSource const& rows,
                                       FullBarrier& barrier, Element* destination,
                                       Source const& source) const {
    if constexpr (kGatherWarps == 0) {
      if (source.origin == kGathered) {
        RowGather<Traits::kHeadDim, Element> const from(rows, source.batch, source.head);
        CUTE_UNROLL
        for (int w = 0; w < kWords; ++w) {
          int32_t const token = __shfl_sync(0xffffffff, source.keys[w], from.lane_row());
          from.template gather<Traits::kTileK>(token, w * 32, destination);
        }
        arrive_when_gathered(barrier);
        return;
      }
      barrier.arrive();
    }
    if (source.origin != kGathered && copies()) {
      int const row = (threadIdx.x % 32) << params.geometry.sizes.log2_box;
      load_box<Traits::kHeadDim>(map, barrier, destination + row * 64, Traits::kTileK, kReadByMany,
                                 source.origin, source.head, source.batch);
    }
  }
};

}  // namespace sparse_fmha::sm90
