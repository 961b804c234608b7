// Sequences that share one dimension of tokens. A tile is a contiguous range of one sequence, whose
// ends clip copies and stores. Names are those of geometry/contract.h.
#pragma once

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/packed_plan.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"
#include "sparse_fmha/sm90/geometry/packed/ragged_box.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Packed {
  using Element = typename Traits::Element;
  static_assert(Traits::kValueDim == Traits::kHeadDim, "rows of this geometry have one width");
  using Scheduler = device::CountedScheduler;

  struct Params {
    CUtensorMap q[Traits::kQueryTensors];  // these four as in ragged_box.h
    CUtensorMap k;
    CUtensorMap v;
    CUtensorMap out;
    typename Traits::RowValue* rows;  // [Tq, Hq]
    int32_t heads_q;
    int32_t page_size;
    bool causal;
    device::PackedPlan plan;
  };
  struct Tile : device::PackedTile {
    int32_t head;
    int32_t head_kv;
  };
  struct Shared {
    // This query tile and the next: there is no other until all threads have left this one.
    Tile tiles[2];
    int32_t limits[Traits::kTileQ];  // how many keys each row sees
  };
  struct Work {
    WorkTile tile;
    int32_t place;  // of the rest in Shared, so that it takes no registers
  };
  using Box = Coord;        // first token of a key tile, in its sequence
  using MaskPlace = Coord;  // the same
  using Source = RaggedBox;

  static constexpr StageUse kStageUse = StageUse::kLast;
  static constexpr Loader kLoader = Loader::kOneLane;
  static constexpr int kGatherWarps = 0;
  static constexpr MaskFrom kMaskFrom = MaskFrom::kPositions;
  static constexpr MaskedStages kMaskedStages = MaskedStages::kPartial;
  static constexpr bool kRowThresholds = false;
  static constexpr bool kNotesSkipped = false;

  // Defined in launch.h.
  static void launch(FmhaProblem const& p, ExecutionContext const& context);

  KernelParams<Packed, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ void init() const {}
  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& state) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    work.place = static_cast<int32_t>(state.phase);
    shared.tiles[state.phase] = {params.geometry.plan.tiles[tile.q_tile], tile.head,
                                 tile.head / params.heads_per_kv};
  }

  struct Boxes {
    DescendingWalk walk;
    int count;
    __device__ __forceinline__ Box next(int i) const { return walk.tile(i); }
  };
  __device__ __forceinline__ Boxes boxes(Work const& work) const {
    auto const walk =
        Mechanism::walk(sequence(work), Traits::tile_shape(), {{0, 0, 0}, {0, 0, at(work).row}});
    return {walk, walk.num_partial + walk.num_full};
  }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const { return boxes(work).count; }
  // The key tiles of one consumer's 64 rows.
  __device__ __forceinline__ auto part_walk(Work const& work, int warpgroup) const {
    static_assert(Mechanism::kPartsAreSuffixes, "a consumer passes over the first tiles only");
    return Mechanism::walk(sequence(work), {{1, 1, 64}, Traits::tile_shape().k},
                           {{0, 0, 0}, {0, 0, first_row(work, warpgroup)}});
  }

  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* destination,
                                         Work const& work, int warpgroup) const {
    RaggedBox const box = queries(work, warpgroup);
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load_ragged<Traits::kHeadDim>(params.geometry.q[i], barrier,
                                    destination + i * Traits::kTileQ * Traits::kHeadDim,
                                    Traits::kTileQ, kReadOnce, box);
    }
  }
  __device__ __forceinline__ Source source(Work const& work, Box const& box) const {
    auto const& tile = at(work);
    return {tile.k_begin, tile.k_rows, box[2], tile.head_kv};
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load_ragged<Traits::kHeadDim>(params.geometry.k, barrier, destination, Traits::kTileK,
                                  kReadByMany, source);
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    load_ragged<Traits::kHeadDim>(params.geometry.v, barrier, destination, Traits::kTileK,
                                  kReadByMany, source);
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
    __device__ __forceinline__ Mask(Packed const& geometry, int warpgroup)
        : geometry_(geometry), warpgroup_(warpgroup) {}
    // Limits are left in shared memory: finding them takes more registers than steps have. A warp
    // reads those of its own rows.
    __device__ __forceinline__ void set(Work const& work) {
      int const row = AccumulatorPosition().row;
      __syncwarp();
      if (threadIdx.x % 4 == 0) {  // four threads hold the same rows
        auto const sequence = geometry_.sequence(work);
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          limits()[row + 8 * r] =
              Mechanism::limit(sequence, geometry_.first_row(work, warpgroup_) + row + 8 * r);
        }
      }
      __syncwarp();
    }
    // How many keys a thread's two rows see, counted from its first column.
    struct Seen {
      int32_t limits[kRowsPerThread];
    };
    __device__ __forceinline__ Seen look_up(Work const& /*work*/, MaskPlace const& box) const {
      AccumulatorPosition const position;
      Seen seen;
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        seen.limits[r] = limits()[position.row + 8 * r] - box[2] - position.column;
      }
      return seen;
    }
    __device__ __forceinline__ bool sees(Seen const& seen, int i) const {
      return AccumulatorPosition::column_of(i) < seen.limits[AccumulatorPosition::row_of(i)];
    }

   private:
    __device__ __forceinline__ int32_t* limits() const {
      return geometry_.shared.limits + warpgroup_ * 64;
    }
    Packed const& geometry_;
    int const warpgroup_;
  };

  // Whether the sequence has this row of a consumer.
  __device__ __forceinline__ bool has_row(Work const& work, int warpgroup, int row) const {
    return first_row(work, warpgroup) + row < at(work).q_len;
  }
  // Stores a consumer's 64 rows, clipped to the sequence.
  __device__ __forceinline__ void store_out(Element const* source, Work const& work,
                                            int warpgroup) const {
    store_ragged<Traits::kHeadDim, Traits::kTileQ>(params.geometry.out, source,
                                                   queries(work, warpgroup));
  }
  // For a thread that holds whole rows of the warpgroup: `row` and `row` + 8.
  template <class Body>
  __device__ __forceinline__ void visit_rows(Work const& work, int warpgroup, int row,
                                             Body const& body) const {
    auto const& g = params.geometry;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      if (has_row(work, warpgroup, row + 8 * r)) {
        int64_t const token = at(work).q_begin + first_row(work, warpgroup) + row + 8 * r;
        body(r, g.rows[token * g.heads_q + at(work).head]);
      }
    }
  }

 private:
  __device__ __forceinline__ Tile const& at(Work const& work) const {
    return shared.tiles[work.place];
  }
  __device__ __forceinline__ int32_t first_row(Work const& work, int warpgroup) const {
    return at(work).row + warpgroup * 64;
  }
  __device__ __forceinline__ RaggedBox queries(Work const& work, int warpgroup) const {
    auto const& tile = at(work);
    return {tile.q_begin, tile.q_len, first_row(work, warpgroup), tile.head};
  }
  // What the mechanism needs to know of a tile's sequence.
  __device__ __forceinline__ typename Mechanism::Params sequence(Work const& work) const {
    auto const& g = params.geometry;
    auto const& tile = at(work);
    auto const* const pages = g.plan.pages_before;
    return Mechanism::of(
        g.causal, tile.q_len, tile.k_len,
        {pages == nullptr ? nullptr : pages + int64_t{tile.sequence} * g.plan.page_stride,
         g.page_size});
  }
};

}  // namespace sparse_fmha::sm90
