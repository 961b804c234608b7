// The rows that one gathering warp handles in each stage of a query tile.
#pragma once

#include "sparse_fmha/planning/stripe_stages.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

// 32 rows of each stage. A lane holds the key of one row; it is read while the previous stage is
// gathered. These warps take issue slots from the consumers, so what is constant for a stream or a
// query tile is computed once.
template <class Traits, class Stripes>
class StripeRows {
 public:
  using Element = typename Traits::Element;
  struct Key {
    int32_t token;  // as listed
    bool lone;      // false for all lanes if the stage holds runs
  };
  int const count;  // stages

  // `part`: which 32 rows.
  __device__ __forceinline__ StripeRows(Stripes const& stripes, typename Stripes::Work const& work,
                                        int part)
      : count(work.stages.total()),
        stripes_(stripes),
        work_(work),
        first_(part * 32),
        keys_(stripes.params.geometry.k_rows, work.tile.batch, work.head_kv),
        values_(stripes.params.geometry.v_rows, work.tile.batch, work.head_kv) {
    static_assert(Traits::kTileK % 32 == 0, "a row for each lane");
    fetch(0);
  }
  // The lane's key of the i-th stage.
  __device__ __forceinline__ Key next(int i) {
    Key const key = key_;
    fetch(i + 1);
    return key;
  }
  // Each lane arrives once, also for stages that TMA fills.
  __device__ __forceinline__ void gather_k(Key const& key, Element* destination,
                                           FullBarrier& barrier) const {
    gather(keys_, key, destination, barrier);
  }
  __device__ __forceinline__ void gather_v(Key const& key, Element* destination,
                                           FullBarrier& barrier) const {
    gather(values_, key, destination, barrier);
  }

 private:
  using Gather = RowGather<Traits::kHeadDim, Element>;

  __device__ __forceinline__ void gather(Gather const& from, Key const& key, Element* destination,
                                         FullBarrier& barrier) const {
    if (!__any_sync(0xffffffff, key.lone)) {
      barrier.arrive();
      return;
    }
    from.template gather<Traits::kTileK>(key.token, first_, destination);
    arrive_when_gathered(barrier);
  }
  __device__ __forceinline__ void fetch(int i) {
    if (i >= count) {
      return;
    }
    StreamPlace const place = stream_place(work_.stages, i);
    if (place.stream != stream_) {
      enter(place.stream);
    }
    int32_t const stage = place.index - run_stages_;
    key_.lone = stage >= 0;
    if (key_.lone) {
      key_.token = listed_column(columns_, stage * Traits::kTileK);
    }
  }
  __device__ __forceinline__ void enter(int32_t index) {
    stream_ = index;
    columns_ = stripes_.shared.streams[work_.streams][index];
    run_stages_ = run_stages(stripes_.params.geometry.sizes, columns_);
    int const row = first_ + Gather::lane_row();
    columns_.columns += row;
    columns_.num_columns -= row;
  }

  Stripes const& stripes_;
  typename Stripes::Work const& work_;
  int const first_;
  Gather const keys_;
  Gather const values_;
  int32_t stream_ = -1;  // the current stream
  int32_t run_stages_;
  StripeStream columns_;  // its columns, from the lane's first one
  Key key_{};
};

}  // namespace sparse_fmha::sm90
