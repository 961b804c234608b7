// Tokens on a grid of up to three axes. A tile is a box whose shape is a run-time value.
//
// Boxes are copied directly from the user's tensor and may start at any token: by maps of all
// tokens (strided_boxes.h) or by maps of dilation classes (class_boxes.h). Names are those of
// geometry/contract.h.
#pragma once

#include <type_traits>

#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/mechanisms/dilated.h"
#include "sparse_fmha/planning/tile_order.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"
#include "sparse_fmha/sm90/geometry/grid/class_boxes.h"
#include "sparse_fmha/sm90/geometry/grid/grid_walk.h"
#include "sparse_fmha/sm90/geometry/grid/strided_boxes.h"
#include "sparse_fmha/sm90/geometry/grid/window_mask.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct Grid {
  using Element = typename Traits::Element;
  static_assert(Traits::kValueDim == Traits::kHeadDim, "rows of this geometry have one width");

  static constexpr bool kByClass = std::is_same_v<Mechanism, DilatedNeighborhood>;
  using Places = std::conditional_t<kByClass, ClassBoxes<Traits>, StridedBoxes<Traits, Mechanism>>;

  struct Params : Places::Maps {
    CUtensorMap extra_k;  // (D, N, H, B)
    CUtensorMap extra_v;
    TileShape shape;
    TileOrder order;  // of query tiles
    BoxBits q_bits;   // of shape.q
    BoxBits k_bits;   // of shape.k
    typename Places::Numbers places;
    int32_t first_batch;
    int32_t extra_len;
    typename Traits::RowValue* rows;  // strides in elements; a head's is 1
    int64_t rows_batch;
    int64_t rows_axis[kGridAxes];
  };

  static_assert(Traits::kConsumers == 2, "tiles with powers of two on the sides");
  static constexpr StageUse kStageUse = StageUse::kNeeded;
  static constexpr Loader kLoader = Loader::kOneLane;
  static constexpr int kGatherWarps = 0;
  static constexpr MaskFrom kMaskFrom = MaskFrom::kMaskWarp;
  static constexpr MaskedStages kMaskedStages = MaskedStages::kPartial;
  static constexpr bool kRowThresholds = false;
  static constexpr bool kNotesSkipped = true;

  using MaskPlace = int;  // mask index into WindowWords::inside
  using Source = typename Places::Source;
  using Walk = GridWalk<Traits, Mechanism>;

  struct Work : Places::Origin {
    WorkTile tile;
    QueryTile q;
    Coord length;  // positions per axis in the dilation class
    int32_t num_partial;
    int32_t num_full;
    int32_t walk;  // index into Shared::walks
    int32_t head_kv;
  };

  struct Counts {
    int32_t num_partial;
    int32_t num_full;
  };

  struct Shared {
    int32_t needed[Traits::kStages];  // of the stage's box
    Walk walks[2];                    // of this query tile and the next
    WindowWords<Traits> words;
  };

  // Defined in launch.h.
  static void launch(FmhaProblem const& p, ExecutionContext const& context);

  KernelParams<Grid, Mechanism> const& params;
  Shared& shared;

  // For the mask warp.
  using Masks = WindowMasks<Traits, Mechanism, KernelParams<Grid, Mechanism>>;
  __device__ __forceinline__ Masks masks() const { return {params, shared.words}; }

  __device__ __forceinline__ void init() const { masks().init(); }

  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& state) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    int32_t const q_tile = params.geometry.order.at(tile.q_tile, params.scheduler.q_tiles);
    work.q = Mechanism::query_tile(params.sparsity, params.geometry.shape, q_tile);
    compiler_fence();  // reload from shared memory later: registers are scarce
    for (int axis = 0; axis < kGridAxes; ++axis) {
      work.length[axis] = Mechanism::length(params.sparsity, axis, work.q.residue[axis]);
    }
    auto const boxes = Mechanism::walk(params.sparsity, params.geometry.shape, work.q);
    int32_t const extra_len = params.geometry.extra_len;
    int32_t const ragged = extra_len % Traits::kTileK != 0;
    work.num_partial = boxes.num_partial + ragged;
    work.num_full = boxes.num_full + extra_len / Traits::kTileK;
    work.walk = static_cast<int32_t>(state.phase);
    work.head_kv = tile.head / params.heads_per_kv;
    Places::locate(params, work);
    Walk& walk = shared.walks[state.phase];
    walk.num_partial = work.num_partial;
    walk.num_full = work.num_full;
    walk.ragged = ragged;
    walk.extra_len = extra_len;
    walk.boxes = boxes;
    for (int i = 0; i < Traits::kConsumers * kGridAxes; ++i) {
      int const w = i / kGridAxes;
      int const axis = i % kGridAxes;
      auto window = [&](int row) {
        Coord const offset = params.geometry.q_bits.offset(row);
        return Mechanism::window(params.sparsity, axis, work.length[axis],
                                 work.q.origin[axis] + pick(offset, axis));
      };
      walk.parts[w][axis] = {window(w * 64).begin, window(w * 64 + 63).end};
    }
  }

  // Locating a tile takes many instructions, so the lanes of the warp locate the next 32 together.
  struct Boxes {
    Walk const& walk;
    int count;
    KeyBox mine;
    __device__ __forceinline__ KeyBox next(int i) {
      if (i % 32 == 0) {
        mine = walk.tile(min(i + static_cast<int>(threadIdx.x % 32), count - 1));
      }
      auto from = [&](int32_t x) { return __shfl_sync(0xffffffff, x, i % 32); };
      return {{from(mine.origin[0]), from(mine.origin[1]), from(mine.origin[2])},
              from(mine.extra),
              from(mine.needed)};
    }
  };
  __device__ __forceinline__ Boxes boxes(Work const& work) const {
    return {shared.walks[work.walk], tiles_loaded(work), {}};
  }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const {
    return work.num_partial + work.num_full;
  }
  // Which 64 query rows a consumer has, in the order of query tiles.
  __device__ __forceinline__ int group(Work const& work, int warpgroup) const {
    return 2 * params.geometry.order.at(work.tile.q_tile, params.scheduler.q_tiles) + warpgroup;
  }
  __device__ __forceinline__ Counts part_walk(Work const& work, int /*warpgroup*/) const {
    return {work.num_partial, work.num_full};
  }

  __device__ __forceinline__ Source source(Work const& work, KeyBox const& box) const {
    if (box.extra) {
      return {-1, work.head_kv, {box.origin[2], 0, params.geometry.first_batch + work.tile.batch}};
    }
    return Places::source(params, work, box.origin, work.head_kv);
  }
  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* destination,
                                         Work const& work, int warpgroup) const {
    Places::load_q(params, barrier, destination, work, part(work, warpgroup));
  }
  __device__ __forceinline__ void load_k(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    if (source.map < 0) {
      load_extra(params.geometry.extra_k, barrier, destination, source);
    } else {
      Places::load_k(params.geometry, barrier, destination, source);
    }
  }
  __device__ __forceinline__ void load_v(FullBarrier& barrier, Element* destination,
                                         Source const& source) const {
    if (source.map < 0) {
      load_extra(params.geometry.extra_v, barrier, destination, source);
    } else {
      Places::load_v(params.geometry, barrier, destination, source);
    }
  }

  __device__ __forceinline__ int64_t key_index(Work const& work, KeyBox const& box, int /*w*/,
                                               int column) const {
    Coord position = params.geometry.k_bits.offset(column);
    int64_t index = 0;
    bool there = box.extra == 0;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      position[axis] += box.origin[axis];
      there &= position[axis] >= 0 && position[axis] < work.length[axis];
    }
    Coord const token = Mechanism::token(params.sparsity, work.q.residue, position);
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      index += token[axis] * params.bias.axis_stride[axis];
    }
    return there ? index : -1;
  }
  // The producer writes this with the stage; consumers read it before they release the stage.
  __device__ __forceinline__ void publish(KeyBox const& box,
                                          RingState<Traits::kStages> const& place) const {
    shared.needed[place.index] = box.needed;
    compiler_fence();
  }
  // Also called for a full tile, when it follows tiles that were passed over.
  __device__ __forceinline__ MaskPlace mask_place(Counts const& walk, int i,
                                                  RingState<Traits::kStages> const& place) const {
    return i < walk.num_partial ? WindowWords<Traits>::mask_of(place) : WindowWords<Traits>::kMasks;
  }

  // Whether any row of a consumer sees any key of the box in a stage.
  __device__ __forceinline__ bool needs(int warpgroup,
                                        RingState<Traits::kStages> const& place) const {
    compiler_fence();
    bool const result = shared.needed[place.index] >> warpgroup & 1;
    __syncwarp();  // one lane releases the stage for all
    return result;
  }

  class Mask : public WindowRows<Traits> {
    using Rows = WindowRows<Traits>;

   public:
    using typename Rows::Seen;
    __device__ __forceinline__ Mask(Grid const& geometry, int warpgroup)
        : Rows(geometry.shared.words, geometry.params.geometry.shape.q,
               geometry.params.geometry.q_bits, warpgroup) {}
    __device__ __forceinline__ void set(Work const& /*work*/) {}
    __device__ __forceinline__ Seen look_up(Work const& /*work*/, MaskPlace mask) const {
      return Rows::look_up(mask);
    }
  };

  __device__ __forceinline__ bool has_row(Work const& work, int warpgroup, int row) const {
    Coord const offset = params.geometry.q_bits.offset(warpgroup * 64 + row);
    bool inside = true;
    CUTE_UNROLL
    for (int axis = 0; axis < kGridAxes; ++axis) {
      inside &= work.q.origin[axis] + offset[axis] < work.length[axis];
    }
    return inside;
  }
  // Stores a consumer's rows, clipped to the tensor.
  __device__ __forceinline__ void store_out(Element const* from, Work const& work,
                                            int warpgroup) const {
    Places::store_out(params, from, work, part(work, warpgroup));
  }
  template <class Body>
  __device__ __forceinline__ void visit_rows(Work const& work, int warpgroup, int row,
                                             Body const& body) const {
    auto const& g = params.geometry;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      Coord position = g.q_bits.offset(warpgroup * 64 + row + 8 * r);
      bool inside = true;
      CUTE_UNROLL
      for (int axis = 0; axis < kGridAxes; ++axis) {
        position[axis] += work.q.origin[axis];
        inside &= position[axis] < work.length[axis];
      }
      if (inside) {
        Coord const token = Mechanism::token(params.sparsity, work.q.residue, position);
        int64_t offset = (g.first_batch + work.tile.batch) * g.rows_batch + work.tile.head;
        CUTE_UNROLL
        for (int axis = 0; axis < kGridAxes; ++axis) {
          offset += token[axis] * g.rows_axis[axis];
        }
        body(r, g.rows[offset]);
      }
    }
  }

 private:
  // Position of a consumer's first row; its 64 rows form a box.
  __device__ __forceinline__ Coord part(Work const& work, int warpgroup) const {
    Coord const offset = params.geometry.q_bits.offset(warpgroup * 64);
    return {work.q.origin[0] + offset[0], work.q.origin[1] + offset[1],
            work.q.origin[2] + offset[2]};
  }
  static __device__ __forceinline__ void load_extra(CUtensorMap const& map, FullBarrier& barrier,
                                                    Element* destination, Source const& from) {
    load_box<Traits::kHeadDim>(map, barrier, destination, Traits::kTileK, kReadByMany,
                               from.place[0], from.head, from.place[2]);
  }
};

}  // namespace sparse_fmha::sm90
