// The stages of a query tile and each producer lane's share of them.
#pragma once

#include "sparse_fmha/planning/stripe_stages.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/key_bias.h"

namespace sparse_fmha::sm90 {

// In order. A stage's list entries are read while the previous stage is copied.
template <class Traits, class Stripes>
class StripeBoxes {
 public:
  using Box = typename Stripes::StageBox;
  int const count;

  __device__ __forceinline__ StripeBoxes(Stripes const& stripes, typename Stripes::Work const& work)
      : count(work.stages.total()), stripes_(stripes), work_(work) {
    fetch(0);
  }
  __device__ __forceinline__ Box next(int i) {
    Box const box = with_keys(found_);
    fetch(i + 1);
    return box;
  }

 private:
  __device__ __forceinline__ bool needs_keys(Box const& box) const {
    return box.masked || Stripes::kGatherWarps == 0 || has_biases<Traits>(stripes_.params);
  }
  __device__ __forceinline__ void fetch(int i) {
    if (i < count) {
      StreamPlace const place = stream_place(work_.stages, i);
      // If both consumers share all stages, the masked ones are known.
      WholeStages const& whole = work_.whole[0];
      found_.masked = work_.stages.both < count || i < whole.begin || i >= whole.end;
      find(stripes_.shared.streams[work_.streams][place.stream], place.index);
    }
  }
  // Reads the lane's list entries of a stage.
  __device__ __forceinline__ void find(StripeStream const& stream, int32_t stage) {
    auto const& sizes = stripes_.params.geometry.sizes;
    int32_t const lane = threadIdx.x % 32;
    int32_t const runs = run_stages(sizes, stream);
    if (stage < runs) {
      found_.origin = stripes_.copies()
                          ? run_origin(stripes_.params.sparsity, sizes, stream, stage, lane)
                          : kAbsent;
      return;
    }
    found_.origin = Stripes::kGathered;
    if (!needs_keys(found_)) {
      return;
    }
    StripeStream const columns = stream;
    CUTE_UNROLL
    for (int w = 0; w < Stripes::kWords; ++w) {
      found_.keys[w] = listed_column(columns, (stage - runs) * Traits::kTileK + w * 32 + lane);
    }
  }
  // Adds the keys of runs and the listed keys.
  __device__ __forceinline__ Box with_keys(Box box) const {
    int32_t const log2_box = stripes_.params.geometry.sizes.log2_box;
    if (!needs_keys(box)) {
      return box;
    }
    CUTE_UNROLL
    for (int w = 0; w < Stripes::kWords; ++w) {
      int32_t const row = w * 32 + threadIdx.x % 32;
      int32_t const origin = __shfl_sync(0xffffffff, box.origin, row >> log2_box);
      box.keys[w] = box.origin == Stripes::kGathered
                        ? column_key(stripes_.params.sparsity, box.keys[w])
                        : origin + (row & ((1 << log2_box) - 1));
    }
    return box;
  }

  Stripes const& stripes_;
  typename Stripes::Work const& work_;
  Box found_{};
};

}  // namespace sparse_fmha::sm90
