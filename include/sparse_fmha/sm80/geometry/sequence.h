// Tokens on one axis. A tile is a contiguous range whose length is known at compile time. Names are
// those of geometry/contract.h.
#pragma once

#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/forward/run_kernel.h"
#include "sparse_fmha/sm80/geometry/contract.h"
#include "sparse_fmha/sm80/geometry/query_tokens.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct Sequence {
  using Element = typename Traits::Element;
  using Walk = decltype(Mechanism::walk({}, {}, {}));
  static_assert(Mechanism::kPartsAreSuffixes, "a group of rows passes over the first tiles only");

  struct Params {};
  struct Shared {};
  struct Work {
    QueryTokens<Element> queries;
    Element const* k;  // of the head
    Element const* v;
    Walk walk;
    int32_t passed[Traits::kGroups];  // leading tiles that a group does not see
  };

  KernelParams<Sequence, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& s = params.sparsity;
    int32_t const first = tile.q_tile * Traits::kTileQ;
    int32_t const head_kv = tile.head / params.heads_per_kv;
    Work work{{params, tile, first, s.len_q},
              head_of<Element>(params.k, tile.batch, head_kv),
              head_of<Element>(params.v, tile.batch, head_kv),
              Mechanism::walk(s, Traits::tile_shape(), {{0, 0, 0}, {0, 0, first}}),
              {}};
    CUTE_UNROLL
    for (int g = 0; g < Traits::kGroups; ++g) {
      Walk const part = Mechanism::walk(s, {{1, 1, 64}, Traits::tile_shape().k},
                                        {{0, 0, 0}, {0, 0, first + 64 * g}});
      work.passed[g] = tiles(work) - part.num_partial - part.num_full;
    }
    return work;
  }
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work,
                                                        TensorView const& view) const {
    return work.queries.rows(view);
  }
  __device__ __forceinline__ int64_t out_row(Work const& work, int r) const {
    return work.queries.out_row(params, r);
  }

  __device__ __forceinline__ int tiles(Work const& work) const {
    return work.walk.num_partial + work.walk.num_full;
  }
  __device__ __forceinline__ void place(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ TokenRows<Element> keys(Work const& work, int i) const {
    return {work.k, params.k.axis_stride[kGridAxes - 1], work.walk.tile(i)[2],
            params.sparsity.len_kv};
  }
  __device__ __forceinline__ TokenRows<Element> values(Work const& work, int i) const {
    return {work.v, params.v.axis_stride[kGridAxes - 1], work.walk.tile(i)[2],
            params.sparsity.len_kv};
  }
  __device__ __forceinline__ int64_t key_index(Work const& work, int i, int r) const {
    int32_t const token = work.walk.tile(i)[2] + r;
    return token < params.sparsity.len_kv ? token : -1;
  }
  __device__ __forceinline__ void write_mask(Work const& /*work*/, int /*i*/) const {}
  __device__ __forceinline__ bool needs(Work const& work, int i, int group) const {
    return i >= (group == 0 ? work.passed[0] : work.passed[Traits::kGroups - 1]);
  }
  __device__ __forceinline__ bool is_masked(Work const& work, int i) const {
    return i < work.walk.num_partial;
  }

  class Mask {
   public:
    __device__ __forceinline__ Mask(Sequence const& geometry, Work const& work, int row)
        : walk_(work.walk) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        int32_t const query = work.queries.first + row + 8 * r;
        limit_[r] = Mechanism::row(geometry.params.sparsity, {0, 0, 0}, {0, 0, query}).limit;
      }
    }
    struct Seen {
      int32_t columns[kRowsPerThread];  // a row sees those below, from the thread's first one
      __device__ __forceinline__ void pass_over(int n) {
        columns[0] -= n;
        columns[1] -= n;
      }
    };
    __device__ __forceinline__ Seen look_up(int i) const {
      int32_t const first = walk_.tile(i)[2] + AccumulatorPosition().column;
      return {{limit_[0] - first, limit_[1] - first}};
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) {
      return AccumulatorPosition::column_of(i) < seen.columns[AccumulatorPosition::row_of(i)];
    }

   private:
    Walk const walk_;
    int32_t limit_[kRowsPerThread];  // keys [0, limit) are visible
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    KernelParams<Sequence, Mechanism> params;
    params.geometry = {};
    params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    int32_t const q_tiles = Mechanism::num_query_tiles(params.sparsity, Traits::tile_shape());
    run_kernel<Traits>(params, p, q_tiles, params.sparsity.len_kv, context);
  }
};

}  // namespace sparse_fmha::sm80
