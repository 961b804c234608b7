// How a block walks over the tiles of a piece.
#pragma once

#include "sparse_fmha/device/decode/cap_scores.h"
#include "sparse_fmha/device/decode/tile_mask.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm80/decode/queries.h"
#include "sparse_fmha/sm80/decode/storage.h"

namespace sparse_fmha::sm80 {

template <class Traits>
using DecodeOutput =
    decltype(cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kHeadDim / 2>>{}));

// What both walks do with a tile. Warps whose 16 rows do not exist only copy.
template <class Traits>
struct DecodeSteps {
  DecodeParams const& params;
  DecodeStorage<Traits>& smem;
  PlaceFinder<Traits> finder{params, smem};

  __device__ __forceinline__ KeyRange rows() const {
    return params.keys.rows_of(smem.piece.at.row_group);
  }
  __device__ __forceinline__ bool has_rows() const {
    return threadIdx.x / 32 * 16 < rows().end - rows().begin;
  }
  // Tiles of keys or values, counted from the piece's first.
  __device__ __forceinline__ int32_t count() const {
    return smem.piece.tiles.end - smem.piece.tiles.begin;
  }
  __device__ __forceinline__ TilePlaces<Traits> const& places_of(int32_t i) const {
    return smem.places_of(i);
  }
  __device__ __forceinline__ void copy_keys(int32_t i, int stage) const {
    copy_stage<Traits>(smem.stage(stage), params.k, smem.piece.at.head, params.head_dim,
                       places_of(i).keys);
  }
  __device__ __forceinline__ void copy_values(int32_t i, int stage) const {
    copy_stage<Traits>(smem.stage(stage), params.v, smem.piece.at.head, params.head_dim,
                       places_of(i).values);
  }
  __device__ __forceinline__ void find_first() {
    finder.begin(Traits::kPlaces - 1);
    __syncthreads();
  }
  // Once all threads are in step i.
  __device__ __forceinline__ void find_next(int32_t i) { finder.go_on(i + Traits::kPlaces - 1); }

  template <class Scores>
  __device__ __forceinline__ void score(Queries<Traits> const& queries, int32_t i, int stage,
                                        Scores& scores) const {
    multiply_keys<Traits>(queries, smem.stage(stage), scores, lane_of_tile());
    cap_scores(params, scores);
    auto const& places = places_of(i);
    if (places.masked[0] | places.masked[1]) {
      DecodeTileMask<Traits>{params, smem.piece, rows(), places.position}.hide(scores);
    }
  }
};

// All tiles count. Stages hold keys and values in turn, so that a tile is copied while the one
// before is computed.
template <class Traits>
struct DecodeWalk {
  DecodeSteps<Traits> steps;

  // Before the queries are loaded.
  __device__ __forceinline__ void begin() {
    steps.find_first();
    CUTE_UNROLL
    for (int item = 0; item + 1 < kStages; ++item) {
      copy(item);
    }
  }
  __device__ __forceinline__ void run(Queries<Traits> const& queries, OnlineSoftmax& softmax,
                                      DecodeOutput<Traits>& output) {
    bool const computes = steps.has_rows();
    int stage = 0;
    auto const advance = [&] { stage = stage + 1 < kStages ? stage + 1 : 0; };
    CUTE_NO_UNROLL
    for (int32_t i = 0; i < steps.count(); ++i) {
      await();
      copy(2 * i + kStages - 1);
      steps.find_next(i);
      Weights<Traits> weights;
      if (computes) {
        auto scores = cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kTileK / 2>>{});
        steps.score(queries, i, stage, scores);
        float rescale[kRowsPerThread];
        if (softmax.template update<true>(scores, rescale)) {
          rescale_rows(output, rescale);
        }
        weights.take(scores);
      }
      advance();
      await();
      copy(2 * i + kStages);
      if (computes) {
        multiply_values<Traits>(weights, steps.smem.stage(stage), output, lane_of_tile());
      }
      advance();
    }
  }

 private:
  static constexpr int kStages = Traits::kStages;

  // Until the next item has landed, and the one before it is no longer read.
  static __device__ __forceinline__ void await() {
    cutlass::arch::cp_async_wait<kStages - 2>();
    __syncthreads();
  }
  // Item 2i is the keys of tile i, item 2i + 1 its values.
  __device__ __forceinline__ void copy(int32_t item) const {
    if (item / 2 < steps.count() && item % 2 == 0) {
      steps.copy_keys(item / 2, item % kStages);
    } else if (item / 2 < steps.count()) {
      steps.copy_values(item / 2, item % kStages);
    }
    cutlass::arch::cp_async_fence();
  }
};

// The rows vote on each tile, and the values of a tile are copied if it is kept. The last stage is
// for values, the others for keys.
template <class Traits>
struct VotingDecodeWalk {
  DecodeSteps<Traits> steps;

  __device__ __forceinline__ void begin() {
    steps.find_first();
    CUTE_UNROLL
    for (int i = 0; i < kKeyStages; ++i) {
      copy_keys(i);
      if (i + 1 < kKeyStages) {
        cutlass::arch::cp_async_fence();  // two groups to a tile, as below
      }
    }
  }
  __device__ __forceinline__ void run(Queries<Traits> const& queries, OnlineSoftmax& softmax,
                                      DecodeOutput<Traits>& output) {
    auto const& params = steps.params;
    bool const computes = steps.has_rows();
    auto const& at = steps.smem.piece.at;
    KeyRange const rows = steps.rows();
    TileVote vote(params.skip, {0, at.head, at.batch}, params.scale_log2, 0,
                  [&](int r) { return rows.begin + AccumulatorPosition{}.row + 8 * r < rows.end; });
    CUTE_NO_UNROLL
    for (int32_t i = 0; i < steps.count(); ++i) {
      cutlass::arch::cp_async_wait<2 * (kKeyStages - 1)>();
      __syncthreads();
      steps.find_next(i);
      auto scores = cute::make_tensor<float>(cute::Shape<cute::Int<Traits::kTileK / 2>>{});
      float high[kRowsPerThread] = {-INFINITY, -INFINITY};
      if (computes) {
        steps.score(queries, i, i % kKeyStages, scores);
        OnlineSoftmax::own_tops(scores, high);
      }
      bool const kept = !vote.template leaves_out<true>(high);  // synchronises the block
      if (kept) {
        steps.copy_values(i, kKeyStages);
      }
      cutlass::arch::cp_async_fence();
      copy_keys(i + kKeyStages);
      if (!kept) {
        continue;
      }
      Weights<Traits> weights;
      if (computes) {
        OnlineSoftmax::share_tops(high);
        vote.keep(high);
        float rescale[kRowsPerThread];
        if (softmax.template update<true>(scores, high, rescale)) {
          rescale_rows(output, rescale);
        }
        weights.take(scores);
      }
      cutlass::arch::cp_async_wait<1>();  // all but the last keys
      __syncthreads();
      if (computes) {
        multiply_values<Traits>(weights, steps.smem.stage(kKeyStages), output, lane_of_tile());
      }
    }
    vote.add_to(params.skip, {0, at.head, at.batch});
  }

 private:
  static constexpr int kKeyStages = Traits::kStages - 1;

  __device__ __forceinline__ void copy_keys(int32_t i) const {
    if (i < steps.count()) {
      steps.copy_keys(i, i % kKeyStages);
    }
    cutlass::arch::cp_async_fence();
  }
};

}  // namespace sparse_fmha::sm80
