// Tokens on one axis, with lists of key blocks in device memory.
//
// A stage holds several boxes of keys, so the matrix tile does not depend on the block size: lane g
// of the producer's warp reads the list entry of box g and copies the box. In the last stage of a
// stream, boxes past the end of the list are copied from beyond the last key, which reads as zeros.
// Query blocks of 64 rows have a consumer each. The stages that both need form one stream; those
// that only one needs form another, which the other consumer passes over. Names are those of
// geometry/contract.h.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/bit_mask.h"
#include "sparse_fmha/device/look_through.h"
#include "sparse_fmha/planning/list_stages.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/common/this_consumer.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"
#include "sparse_fmha/sm90/geometry/query_rows.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Lists {
  using Element = typename Traits::Element;
  static constexpr int kMaxBoxes = Traits::kTileK / 16;  // per stage
  static constexpr int kBitsBytes = 128 * 16;            // bitmasks of a stage

  struct Params {
    CUtensorMap q[Traits::kQueryTensors];  // (D, Lq, Hq, B)
    CUtensorMap k;                         // (D, Lkv, Hkv, B)
    CUtensorMap v;                         // (D, Lkv, Hkv, B)
    CUtensorMap out;                       // (D, Lq, Hq, B)
    typename Traits::RowValue* rows;       // [B, Lq, Hq]
    int32_t heads_q;
    int32_t q_tiles;
    BoxSizes sizes;
    ListPlan plan;
  };

  static_assert(Traits::kConsumers == 2, "a query tile is one block of 128 rows or two of 64");
  static constexpr StageUse kStageUse = StageUse::kStreams;
  static constexpr Loader kLoader = Loader::kAllLanes;
  static constexpr int kGatherWarps = 0;
  static constexpr MaskFrom kMaskFrom = MaskFrom::kStage;
  static constexpr MaskedStages kMaskedStages = MaskedStages::kByWalk;
  static constexpr bool kRowThresholds = Traits::kHeadDim <= 128;  // registers are few beyond
  // Where thresholds leave no register for a consumer's number: in forward kernels with biases.
  static constexpr bool kFewRegisters = Traits::kKeyBias && !Traits::kBiasOptional;
  static constexpr bool kNotesSkipped = true;

  struct Work {
    WorkTile tile;
    int32_t head_kv;
    int32_t q_tile;
    int32_t streams;  // index into Shared::streams
    StreamStages stages;
    WholeStages whole[3];  // of each stream
  };
  struct Stage {
    uint32_t with_bits;         // bit g: box g has a bitmask
    int32_t origin[kMaxBoxes];  // the first token of each box
  };
  struct Shared {
    alignas(128) uint8_t bits[Traits::kStages][kBitsBytes];
    Stage stages[2 * Traits::kStages];  // written while earlier stages are in use
    ListStream streams[2][3];           // of this query tile and the next
  };
  // One lane's box of a stage, for the producer.
  struct Source {
    int32_t origin;
    int32_t head;
    int32_t batch;
  };
  struct StageBox {
    Source source;
    uint8_t const* bits;  // nullptr: no bitmask
  };
  struct MaskPlace {  // and for the consumers
    int32_t place;    // index into Shared::stages
    int32_t stage;
  };

  // Defined in launch.h.
  static void launch(FmhaProblem const& p, ExecutionContext const& context);

  KernelParams<Lists, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ void init() const {}

  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& state) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    auto const& g = params.geometry;
    work.head_kv = tile.head / params.heads_per_kv;
    work.streams = static_cast<int32_t>(state.phase);
    // The scheduler counts down.
    int64_t const tiles = tile.batch * g.plan.batch_stride + tile.head * g.plan.head_stride;
    work.q_tile = g.plan.order[tiles + g.q_tiles - 1 - tile.q_tile];
    auto& streams = shared.streams[state.phase];
    find_streams(params.sparsity, g.plan, tile.batch, tile.head, work.q_tile, streams);
    work.stages = count_stages(g.sizes, streams);
  }

  // Called by the whole warp that hands out query tiles: finds the stages in which no row needs a
  // mask.
  __device__ __forceinline__ void look_through(Work& work, RingState<1> const& state) const {
    auto const& sizes = params.geometry.sizes;
    CUTE_UNROLL
    for (int n = 0; n < 3; ++n) {
      ListStream const& stream = shared.streams[state.phase][n];
      int32_t const first_query = first_token(work, n == 2 ? 1 : 0);
      int32_t const fulls = stream.entries - stream.partials;
      int32_t const first_masked = first_of_warp(fulls, [&](int32_t i) {
        return !is_whole(params.sparsity, stream.full[i], first_query);
      });
      if (threadIdx.x % 32 == 0) {
        work.whole[n] = whole_stages(sizes, stream, first_masked);
      }
    }
  }

  // The stages of a query tile in order. A stage's list entries are read while the previous stage
  // is copied.
  class Boxes {
   public:
    int const count;
    __device__ __forceinline__ Boxes(Lists const& lists, Work const& work)
        : count(work.stages.total()), lists_(lists), work_(work) {
      fetch(0);
    }
    __device__ __forceinline__ StageBox next(int i) {
      StageBox const box = lists_.box_of(work_, stream_, box_);
      fetch(i + 1);
      return box;
    }

   private:
    __device__ __forceinline__ void fetch(int i) {
      if (i < count && lists_.copies()) {
        StreamPlace const place = stream_place(work_.stages, i);
        stream_ = place.stream;
        box_ = list_box(lists_.params.geometry.sizes,
                        lists_.shared.streams[work_.streams][place.stream], place.index,
                        static_cast<int32_t>(threadIdx.x % 32));
      }
    }
    Lists const& lists_;
    Work const work_;
    int32_t stream_ = 0;
    ListBox box_{};
  };
  __device__ __forceinline__ Boxes boxes(Work const& work) const { return {*this, work}; }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const {
    return work.stages.total();
  }
  // Which 64 query rows a consumer has.
  __device__ __forceinline__ int group(Work const& work, int warpgroup) const {
    return first_token(work, warpgroup) / 64;
  }
  __device__ __forceinline__ ListWalk part_walk(Work const& work, int warpgroup) const {
    int const consumer = kFewRegisters ? this_consumer() : warpgroup;
    return list_walk(work.stages, work.whole[0], consumer == 0 ? work.whole[1] : work.whole[2],
                     consumer);
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
  __device__ __forceinline__ Source source(Work const& /*work*/, StageBox const& box) const {
    return box.source;
  }
  __device__ __forceinline__ uint32_t copied_bytes(Source const& /*source*/,
                                                   uint32_t of_stage) const {
    return of_stage;
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load<Traits::kHeadDim>(params.geometry.k, barrier, destination, source);
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load<Traits::kValueDim>(params.geometry.v, barrier, destination, source);
  }

  static __device__ __forceinline__ int published_place(RingState<Traits::kStages> const& place) {
    return place.index + static_cast<int>(place.phase) * Traits::kStages;
  }
  // Called by the whole warp: writes what consumers need to know about the stage.
  __device__ __forceinline__ void publish(StageBox const& box,
                                          RingState<Traits::kStages> const& place) const {
    Stage& stage = shared.stages[published_place(place)];
    uint32_t const lane = threadIdx.x % 32;
    uint32_t const with_bits = __ballot_sync(0xffffffff, box.bits != nullptr);
    if (copies()) {
      stage.origin[lane] = box.source.origin;
    }
    if (lane == 0) {
      stage.with_bits = with_bits;
    }
    __syncwarp();
    compiler_fence();
  }
  __device__ __forceinline__ int64_t key_index(Work const& /*work*/, StageBox const& box, int /*w*/,
                                               int column) const {
    int32_t const log2_box = params.geometry.sizes.log2_box;
    int32_t const origin = __shfl_sync(0xffffffff, box.source.origin, column >> log2_box);
    int32_t const token = origin + (column & ((1 << log2_box) - 1));
    return token < params.sparsity.len_kv ? token : -1;
  }
  // Called by the whole warp: copies the stage's bitmasks. Returns the bytes that the barrier will
  // receive.
  __device__ __forceinline__ uint32_t copy_bits(StageBox const& box,
                                                RingState<Traits::kStages> const& place,
                                                FullBarrier& barrier) const {
    uint32_t const lane = threadIdx.x % 32;
    uint32_t const bytes = BlockSparse::bits_bytes(params.sparsity);
    if (box.bits != nullptr) {
      cute::SM90_BULK_COPY_G2S::copy(box.bits, reinterpret_cast<uint64_t*>(&barrier),
                                     shared.bits[place.index] + lane * bytes, bytes);
    }
    return __popc(__ballot_sync(0xffffffff, box.bits != nullptr)) * bytes;
  }
  __device__ __forceinline__ MaskPlace mask_place(ListWalk const& /*walk*/, int /*i*/,
                                                  RingState<Traits::kStages> const& place) const {
    return {published_place(place), place.index};
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Lists const& lists, int warpgroup)
        : lists_(lists), warpgroup_(warpgroup) {}
    __device__ __forceinline__ void set(Work const& work) {
      int32_t const query = lists_.first_token(work, warpgroup_) + AccumulatorPosition().row;
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        limit_[r] = BlockSparse::limit(lists_.params.sparsity, query + 8 * r);
      }
    }
    using Seen = ColumnBits<Traits::kTileK>;
    __device__ __forceinline__ Seen look_up(Work const& /*work*/, MaskPlace const& at) const {
      auto const& s = lists_.params.sparsity;
      compiler_fence();
      Stage const& stage = lists_.shared.stages[at.place];
      int32_t const row = AccumulatorPosition().row + (s.block_q == 128 ? 64 * warpgroup_ : 0);
      Seen seen;
      CUTE_UNROLL
      for (int word = 0; word < Seen::kWords; ++word) {
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          seen.set(r, word,
                   seen_columns(s, lists_.params.geometry.sizes, stage.origin, stage.with_bits,
                                lists_.shared.bits[at.stage], row + 8 * r, limit_[r], word));
        }
      }
      __syncwarp();  // one lane releases the stage for all
      return seen;
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

   private:
    Lists const& lists_;
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
    store_rows<Traits::kValueDim, Traits::kTileQ>(params.geometry.out, source,
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
  __device__ __forceinline__ bool copies() const {
    return threadIdx.x % 32 < (1u << params.geometry.sizes.log2_boxes);
  }
  __device__ __forceinline__ int first_token(Work const& work, int warpgroup) const {
    return work.q_tile * Traits::kTileQ + warpgroup * 64;
  }
  __device__ __forceinline__ StageBox box_of(Work const& work, int32_t stream,
                                             ListBox const& box) const {
    int32_t const origin =
        copies() ? box_origin(params.sparsity, params.geometry.sizes, box) : kAbsent;
    ListStream const& from = shared.streams[work.streams][stream];
    bool const partial = origin != kAbsent && box.entry < from.partials;
    return {{origin, work.head_kv, work.tile.batch},
            partial ? from.bits + int64_t(box.entry) * BlockSparse::bits_bytes(params.sparsity)
                    : nullptr};
  }
  template <int kColumns>
  __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                       Element* destination, Source const& source) const {
    if (copies()) {
      int const row = (threadIdx.x % 32) << params.geometry.sizes.log2_box;
      load_box<kColumns>(map, barrier, destination + row * 64, Traits::kTileK, kReadByMany,
                         source.origin, source.head, source.batch);
    }
  }
};

}  // namespace sparse_fmha::sm90
