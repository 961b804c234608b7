// What a worker of a decode kernel writes: the results of its pieces, and where pieces of a group
// are to be merged. A worker is 128 threads, which hold 64 rows as in device/accumulator.h.
#pragma once

#include "sparse_fmha/device/decode/finish.h"
#include "sparse_fmha/device/decode/pieces.h"
#include "sparse_fmha/device/softmax.h"

namespace sparse_fmha::device {

template <class Element>
struct DecodeResults {
  DecodeParams const& params;

  // Stores what a piece has of its rows, and who begins a group that is merged.
  template <class Output>
  __device__ __forceinline__ void store(DecodePiece const& piece, KeyRange rows,
                                        OnlineSoftmax const& softmax, Output const& output) const {
    AccumulatorPosition const place;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = rows.begin + place.row + 8 * r;
      float const sum = reduce_quad(softmax.row_sum[r], [](float a, float b) { return a + b; });
      float const top = softmax.row_max[r] * params.scale_log2;
      if (row >= rows.end) {
        continue;
      }
      if (piece.alone()) {
        DecodeRow const to(params, piece.at, row);
        FinishedRow const end = finish_row(params.keys, to.head, top, sum);
        auto* const out = static_cast<Element*>(params.out.data) + to.offset(params.out);
        store_row(r, output, [&](int column, float x, float y) {
          out[column] = static_cast<Element>(x * end.factor);
          out[column + 1] = static_cast<Element>(y * end.factor);
        });
        if (place.column == 0) {
          to.store_lse(params, end.lse);
        }
      } else {
        int64_t const to = piece.place() * params.rows + row - rows.begin;
        float* const partial = params.partial + to * params.head_dim;
        store_row(r, output, [&](int column, float x, float y) {
          *reinterpret_cast<float2*>(partial + column) = {x, y};
        });
        if (place.column == 0) {
          params.sums[to] = {top, sum};
        }
      }
    }
    if (piece.begins && is_first_thread()) {
      int4 const merge = {piece.alone() ? -1 : piece.group, piece.part, piece.last_part, 0};
      if (params.merges_by_group) {
        params.merges[piece.group] = merge;
      } else if (!piece.alone()) {
        params.merges[piece.part] = merge;
      }
    }
  }

  __device__ __forceinline__ void begin_part(int32_t part) const {
    if (!params.merges_by_group && is_first_thread()) {
      params.merges[part] = kNoMerge;
    }
  }
  // The parts from `count` on do not exist. Shared by the call's `workers`.
  __device__ __forceinline__ void clear_merges_from(int32_t count, int32_t worker,
                                                    int32_t workers) const {
    if (!params.merges_by_group) {
      CUTE_NO_UNROLL
      for (int32_t part = count + worker * 128 + threadIdx.x % 128; part < params.most_merges;
           part += workers * 128) {
        params.merges[part] = kNoMerge;
      }
    }
  }

  // The outputs of the groups without keys, shared likewise.
  __device__ __forceinline__ void store_empty_groups(DecodePlan const& plan, int32_t worker,
                                                     int32_t workers) const {
    CUTE_NO_UNROLL
    for (int32_t group = worker; group < params.groups; group += workers) {
      if (plan.first[group] == plan.first[group + 1]) {
        store_empty(params.group(group));
        if (params.merges_by_group && is_first_thread()) {
          params.merges[group] = kNoMerge;
        }
      }
    }
  }

 private:
  static constexpr int4 kNoMerge = {-1, 0, 0, 0};
  static __device__ __forceinline__ bool is_first_thread() { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void store_empty(DecodeParams::Group const& at) const {
    KeyRange const rows = params.keys.rows_of(at.row_group);
    CUTE_NO_UNROLL
    for (int32_t row = rows.begin + threadIdx.x % 128 / 32; row < rows.end; row += 4) {
      DecodeRow const to(params, at, row);
      auto* const out = static_cast<Element*>(params.out.data) + to.offset(params.out);
      CUTE_NO_UNROLL
      for (int column = threadIdx.x % 32; column < params.head_dim; column += 32) {
        out[column] = Element(0.f);
      }
      if (threadIdx.x % 32 == 0) {
        to.store_lse(params, finish_row(params.keys, to.head, -INFINITY, 0.f).lse);
      }
    }
  }

  template <class Output, class Put>
  __device__ __forceinline__ void store_row(int r, Output const& output, Put put) const {
    AccumulatorPosition const place;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(output); i += 4) {
      int const column = place.column + AccumulatorPosition::column_of(i);
      if (column < params.head_dim) {
        put(column, output(i + 2 * r), output(i + 2 * r + 1));
      }
    }
  }
};

}  // namespace sparse_fmha::device
