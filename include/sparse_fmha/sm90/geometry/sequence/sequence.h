// Tokens on one axis. A tile is a contiguous range whose length is known at compile time. Names are
// those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"
#include "sparse_fmha/sm90/geometry/query_rows.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Sequence {
  using Element = typename Traits::Element;

  struct Params {
    CUtensorMap q[Traits::kQueryTensors];  // (D, Lq, Hq, B)
    CUtensorMap k;                         // (D, Lkv, Hkv, B)
    CUtensorMap v;                         // (Dv, Lkv, Hkv, B)
    CUtensorMap out;                       // (Dv, Lq, Hq, B); of dQ (D, ..)
    typename Traits::RowValue* rows;       // [B, Lq, Hq]
    int32_t len_q;
    int32_t heads_q;
  };
  struct Shared {};
  struct Work {
    WorkTile tile;
    int32_t head_kv;
  };
  using Box = Coord;        // first token of a key tile
  using MaskPlace = Coord;  // the same
  struct Source {
    int32_t token;
    int32_t head;
    int32_t batch;
  };

  static constexpr StageUse kStageUse = StageUse::kLast;
  static constexpr Loader kLoader = Loader::kOneLane;
  static constexpr int kGatherWarps = 0;
  static constexpr MaskFrom kMaskFrom = MaskFrom::kPositions;
  static constexpr MaskedStages kMaskedStages = MaskedStages::kPartial;
  static constexpr bool kRowThresholds = false;
  static constexpr bool kNotesSkipped = true;

  // Defined in launch.h.
  static void launch(FmhaProblem const& p, ExecutionContext const& context);

  KernelParams<Sequence, Mechanism> const& params;
  Shared& shared;

  // The first copy of each tensor need not wait for its map.
  __device__ __forceinline__ void init() const {
    auto const& g = params.geometry;
    auto prefetch = [](CUtensorMap const& map) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&map));
    };
    if (threadIdx.x == 32) {  // the first thread prepares the barriers
      CUTE_UNROLL
      for (auto const& map : g.q) {
        prefetch(map);
      }
      prefetch(g.k);
      prefetch(g.v);
      prefetch(g.out);
    }
  }
  // Prepares a query tile. One producer thread does it for all others.
  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& /*state*/) const {
    work.tile = tile;
    work.head_kv = tile.head / params.heads_per_kv;
  }

  // The key tiles of the whole query tile in order, for the warp that loads them.
  struct Boxes {
    decltype(Mechanism::walk({}, {}, {})) walk;
    int count;
    __device__ __forceinline__ Box next(int i) const { return walk.tile(i); }
  };
  __device__ __forceinline__ Boxes boxes(Work const& work) const {
    auto const walk = Mechanism::walk(params.sparsity, Traits::tile_shape(), query_tile(work));
    return {walk, walk.num_partial + walk.num_full};
  }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const { return boxes(work).count; }
  // Which 64 query rows a consumer has.
  __device__ __forceinline__ int group(Work const& work, int warpgroup) const {
    return first_token(work, warpgroup) / 64;
  }
  // The key tiles of one consumer's 64 rows.
  __device__ __forceinline__ auto part_walk(Work const& work, int warpgroup) const {
    static_assert(Mechanism::kPartsAreSuffixes, "a consumer passes over the first tiles only");
    QueryTile const q = query_tile(work);
    return Mechanism::walk(params.sparsity, {{1, 1, 64}, Traits::tile_shape().k},
                           {q.residue, {0, 0, q.origin[2] + warpgroup * 64}});
  }

  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* destination,
                                         Work const& work, int warpgroup) const {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load<Traits::kHeadDim>(
          params.geometry.q[i], barrier, destination + i * Traits::kTileQ * Traits::kHeadDim,
          Traits::kTileQ, first_token(work, warpgroup), work.tile.head, work.tile.batch, kReadOnce);
    }
  }
  __device__ __forceinline__ Source source(Work const& work, Box const& box) const {
    return {box[2], work.head_kv, work.tile.batch};
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load<Traits::kHeadDim>(params.geometry.k, barrier, destination, Traits::kTileK, source.token,
                           source.head, source.batch, kReadByMany);
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load<Traits::kValueDim>(params.geometry.v, barrier, destination, Traits::kTileK, source.token,
                            source.head, source.batch, kReadByMany);
  }

  __device__ __forceinline__ int64_t key_index(Work const& /*work*/, Box const& box, int /*w*/,
                                               int column) const {
    int32_t const token = box[2] + column;
    return token < params.sparsity.len_kv ? token : -1;
  }
  // Consumers know from the walk which tile is in a stage.
  __device__ __forceinline__ void publish(Box const& /*box*/,
                                          RingState<Traits::kStages> const& /*place*/) const {}
  template <class Walk>
  __device__ __forceinline__ MaskPlace
  mask_place(Walk const& walk, int i, RingState<Traits::kStages> const& /*place*/) const {
    return walk.tile(i);
  }

  // Which pairs are visible: sees(seen, i) for the i-th score of a thread.
  class Mask {
   public:
    __device__ __forceinline__ Mask(Sequence const& geometry, int warpgroup)
        : geometry_(geometry), warpgroup_(warpgroup) {}
    __device__ __forceinline__ void set(Work const& /*work*/) {}
    // What a thread's two rows see of a key tile.
    struct Seen {
      typename Mechanism::Row rows[kRowsPerThread];
    };
    __device__ __forceinline__ Seen look_up(Work const& work, MaskPlace box) const {
      AccumulatorPosition const position;
      box[2] += position.column;
      Seen seen;
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        int const token = geometry_.first_token(work, warpgroup_) + position.row + 8 * r;
        seen.rows[r] =
            Mechanism::row(geometry_.params.sparsity, {0, 0, 0}, {0, 0, token}).relative_to(box);
      }
      return seen;
    }
    __device__ __forceinline__ bool sees(Seen const& seen, int i) const {
      return Mechanism::visible(geometry_.params.sparsity,
                                seen.rows[AccumulatorPosition::row_of(i)],
                                {0, 0, AccumulatorPosition::column_of(i)});
    }

   private:
    Sequence const& geometry_;
    int const warpgroup_;
  };

  // Whether the tensor has this row of a consumer.
  __device__ __forceinline__ bool has_row(Work const& work, int warpgroup, int row) const {
    return first_token(work, warpgroup) + row < params.geometry.len_q;
  }
  // Stores a consumer's 64 rows, clipped to the tensor.
  __device__ __forceinline__ void store_out(Element const* source, Work const& work,
                                            int warpgroup) const {
    store_rows<Traits::kValueDim, Traits::kTileQ>(params.geometry.out, source,
                                                  first_token(work, warpgroup), work.tile);
  }
  // For a thread that holds whole rows of the warpgroup: `row` and `row` + 8.
  template <class Body>
  __device__ __forceinline__ void visit_rows(Work const& work, int warpgroup, int row,
                                             Body const& body) const {
    auto const& g = params.geometry;
    visit_sequence_rows(g.rows, first_token(work, warpgroup) + row, work.tile, g.len_q, g.heads_q,
                        body);
  }

 private:
  __device__ __forceinline__ QueryTile query_tile(Work const& work) const {
    return Mechanism::query_tile(params.sparsity, Traits::tile_shape(), work.tile.q_tile);
  }
  __device__ __forceinline__ int first_token(Work const& work, int warpgroup) const {
    return query_tile(work).origin[2] + warpgroup * 64;
  }
  // Copies tokens of one head, 64 columns at a time. `rows`: rows of the shared-memory tile.
  template <int kColumns>
  static __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                              Element* destination, int rows, int token, int head,
                                              int batch, cute::TMA::CacheHintSm90 hint) {
    load_box<kColumns>(map, barrier, destination, rows, hint, token, head, batch);
  }
};

}  // namespace sparse_fmha::sm90
