// Geometry of the dK/dV kernel on one axis of tokens.
//
// A geometry of that kernel has what geometry/contract.h lists, with keys and queries in each
// other's place. A step is a query tile of one query head of the group:
//
//   Work begin(WorkTile)              a key tile; q_tile is its index, from the last one on
//   keys(Work, view)                  key rows for copy_tile(), of a tensor that has k's shape
//   key_row(Work, r)                  index in [B, Lkv, Hkv], or a negative number
//   steps(Work)                       their number over all heads of the group
//   place(Work, i), write_mask(Work, i)
//   queries(Work, i), douts(Work, i)  their rows for copy_tile()
//   query_row(Work, i, r)             index in [B, Lq, Hq], or a negative number
//   needs(Work, i, row)               whether any of a warp's keys, from `row` on, is seen
//   is_masked(Work, i, row)           whether some of them may not be seen by all
//   Mask(geometry, Work, row)         `row` is the first of a thread's two keys
//   query_place(Work, i)              of a step, for kernels that add dQ up
#pragma once

#include "sparse_fmha/sm80/backward/dkv/run_kernel.h"
#include "sparse_fmha/sm80/backward/traits.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/geometry/contract.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct SequenceKeys {
  using Element = typename Traits::Element;
  using Walk = decltype(Mechanism::walk_transposed({}, {}, {}));

  struct Params {};
  struct Shared {};
  struct Work {
    Walk walk;
    int32_t tiles;  // of each head
    int32_t first_key;
    int32_t head_kv;
    int32_t batch;
    int32_t first_tile;  // of those that see every key, by which blocks beside each other differ
  };
  struct QueryPlace {
    int32_t head;   // in [B, Hq]
    int32_t first;  // query
  };

  DkvParams<SequenceKeys, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    // The scheduler starts with the last tile. The first keys are seen by most queries.
    int32_t const first_key = (params.scheduler.q_tiles - 1 - tile.q_tile) * Traits::kTileK;
    Walk const walk = Mechanism::walk_transposed(params.sparsity, Traits::tile_shape(),
                                                 {{0, 0, 0}, {0, 0, first_key}});
    int32_t const tiles = walk.num_partial + walk.num_full;
    return {walk,      tiles,      first_key,
            tile.head, tile.batch, kRotates && tiles > 0 ? tile.q_tile % tiles : 0};
  }
  __device__ __forceinline__ TokenRows<Element> keys(Work const& work,
                                                     TensorView const& view) const {
    return {sm80::head_of<Element>(view, work.batch, work.head_kv), view.axis_stride[kGridAxes - 1],
            work.first_key, params.sparsity.len_kv};
  }
  __device__ __forceinline__ int64_t key_row(Work const& work, int r) const {
    int32_t const token = work.first_key + r;
    int32_t const length = params.sparsity.len_kv;
    return token < length ? (int64_t{work.batch} * length + token) * params.heads_kv + work.head_kv
                          : -1;
  }

  __device__ __forceinline__ int steps(Work const& work) const {
    return work.tiles * params.heads_per_kv;
  }
  __device__ __forceinline__ void place(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work, int i) const {
    return rows(work, i, params.q);
  }
  __device__ __forceinline__ TokenRows<Element> douts(Work const& work, int i) const {
    return rows(work, i, params.dout);
  }
  __device__ __forceinline__ int64_t query_row(Work const& work, int i, int r) const {
    int32_t const token = first_query(work, i) + r;
    int32_t const length = params.sparsity.len_q;
    return token < length
               ? (int64_t{work.batch} * length + token) * params.heads_q + head_of(work, i)
               : -1;
  }
  __device__ __forceinline__ QueryPlace query_place(Work const& work, int i) const {
    return {work.batch * params.heads_q + head_of(work, i), first_query(work, i)};
  }
  __device__ __forceinline__ void write_mask(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ bool needs(Work const& work, int i, int row) const {
    if constexpr (Mechanism::kStep == 0) {
      return true;
    } else {
      return Mechanism::first_query(params.sparsity, work.first_key + row) <
             first_query(work, i) + Traits::kTileQ;
    }
  }
  __device__ __forceinline__ bool is_masked(Work const& work, int i, int /*row*/) const {
    return i % work.tiles < work.walk.num_partial;
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(SequenceKeys const& geometry, Work const& work, int row)
        : geometry_(geometry), work_(work), key_(work.first_key + row) {}
    struct Seen {
      int32_t first[kRowsPerThread];  // a key is seen from this column on
      __device__ __forceinline__ void pass_over(int columns) {
        first[0] -= columns;
        first[1] -= columns;
      }
    };
    __device__ __forceinline__ Seen look_up(int i) const {
      int32_t const column = geometry_.first_query(work_, i) + AccumulatorPosition().column;
      return {{first_query(key_) - column, first_query(key_ + 8) - column}};
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) {
      return AccumulatorPosition::column_of(i) >= seen.first[AccumulatorPosition::row_of(i)];
    }

   private:
    // Keys out of range read as zero, and their weights may overflow. dQ would meet them.
    __device__ __forceinline__ int32_t first_query(int32_t key) const {
      auto const& s = geometry_.params.sparsity;
      return Traits::kAddsDq && key >= s.len_kv ? s.len_q + Traits::kTileQ
                                                : Mechanism::first_query(s, key);
    }
    SequenceKeys const& geometry_;
    Work const& work_;
    int32_t const key_;
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    DkvParams<SequenceKeys, Mechanism> params;
    params.geometry = {};
    params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    Gradients const& g = *p.gradients;
    with_query_sums<Traits>(params, p, device::sum_tiles(p), context, [&] {
      run_dkv_kernel<Traits>(params, p, {p.k, p.v, g.k, g.v},
                             Mechanism::num_key_tiles(params.sparsity, Traits::tile_shape()),
                             params.sparsity.len_q, context);
    });
  }

 private:
  // Blocks that start at the same query tile would all add to the same sums.
  static constexpr bool kRotates = Traits::kAddsDq && Mechanism::kStep == 0;

  __device__ __forceinline__ TokenRows<Element> rows(Work const& work, int i,
                                                     TensorView const& view) const {
    return {sm80::head_of<Element>(view, work.batch, head_of(work, i)),
            view.axis_stride[kGridAxes - 1], first_query(work, i), params.sparsity.len_q};
  }
  __device__ __forceinline__ int32_t head_of(Work const& work, int i) const {
    return work.head_kv * params.heads_per_kv + i / work.tiles;
  }
  __device__ __forceinline__ int32_t first_query(Work const& work, int i) const {
    int32_t tile = i % work.tiles;
    if constexpr (kRotates) {
      tile += work.first_tile;
      tile -= tile < work.tiles ? 0 : work.tiles;
    }
    return work.walk.tile(tile)[2];
  }
};

}  // namespace sparse_fmha::sm80
