// The consumer of a worker of a decode kernel: the attention of its pieces.
#pragma once

#include <type_traits>

#include "sparse_fmha/sm90/decode/finish.h"
#include "sparse_fmha/sm90/decode/walk.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct DecodeConsumer {
  using Element = typename Traits::Element;
  using Output = DecodeOutput<Traits>;
  using Walk = std::conditional_t<Traits::kVotes, VotingDecodeWalk<Traits>, DecodeWalk<Traits>>;

  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const worker;  // of the block
  Walk walk = {params, smem, worker};

  __device__ __forceinline__ void attend(DecodePiece const& piece) {
    KeyRange const rows = params.keys.rows_of(piece.at.row_group);
    load_queries(piece.at, rows);
    Output output;
    cute::clear(output);
    OnlineSoftmax softmax(params.scale_log2);
    walk.run(piece, rows, softmax, output);
    store(piece, rows, softmax, output);
    if (piece.begins && params.cluster == 0 && is_first_thread()) {
      int32_t const group = piece.group_of_all(params.lines);
      int4 const merge = {piece.alone() ? -1 : group, piece.part, piece.last_part, 0};
      if (params.merges_by_group) {
        params.merges[group] = merge;
      } else if (!piece.alone()) {
        params.merges[piece.part_of_all(params.lines)] = merge;
      }
    }
  }
  __device__ __forceinline__ void begin_part(int32_t part) const {
    if (!params.merges_by_group && params.cluster == 0 && is_first_thread()) {
      params.merges[part] = kNoMerge;
    }
  }
  // The parts from `count` on do not exist.
  __device__ __forceinline__ void clear_merges_from(int32_t count, DecodeTeam const& team) const {
    if (!params.merges_by_group && params.cluster == 0) {
      CUTE_NO_UNROLL
      for (int32_t part = count + team.worker * 128 + threadIdx.x % 128; part < params.most_merges;
           part += team.workers * 128) {
        params.merges[part] = kNoMerge;
      }
    }
  }

  // The outputs of a team's groups without keys, shared by its workers.
  __device__ __forceinline__ void store_empty_groups(DecodePlan const& plan,
                                                     DecodeTeam const& team) const {
    CUTE_NO_UNROLL
    for (int32_t i = team.worker; i < team.groups * params.lines; i += team.workers) {
      int32_t const group = i / params.lines;
      if (plan.first[group] == plan.first[group + 1]) {
        store_empty(params.group(team.first_group + group, i % params.lines));
        if (params.merges_by_group && params.cluster == 0 && is_first_thread()) {
          params.merges[i] = kNoMerge;
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

  __device__ __forceinline__ void load_queries(DecodeParams::Group const& at, KeyRange rows) {
    sync_consumer(worker);  // the products with the last queries are done
    uint32_t const sign = params.negate ? 0x80008000u : 0;
    CUTE_NO_UNROLL
    for (int i = threadIdx.x % 128; i < 64 * Traits::kHeadDim / 8; i += 128) {
      int const r = i / (Traits::kHeadDim / 8);
      int const column = i % (Traits::kHeadDim / 8) * 8;
      int32_t const row = rows.begin + r;
      uint4 x = {0, 0, 0, 0};
      if (row < rows.end && column < params.head_dim) {
        DecodeRow const from(params, at, row);
        x = *reinterpret_cast<uint4 const*>(static_cast<Element const*>(params.q.data) +
                                            from.offset(params.q) + column);
        x = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
      }
      *reinterpret_cast<uint4*>(smem.q + swizzled_place(r, column, 64)) = x;
    }
    cutlass::arch::fence_view_async_shared();
    sync_consumer(worker);
  }

  __device__ __forceinline__ void store(DecodePiece const& piece, KeyRange rows,
                                        OnlineSoftmax const& softmax, Output const& output) const {
    AccumulatorPosition const place;
    if (params.cluster > 0) {
      sync_consumer(worker);  // the products with the last keys are done
    }
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
        bool const shared = params.cluster > 0;
        int64_t const to =
            (shared ? 0 : piece.place(params.lines) * params.rows) + row - rows.begin;
        float* const partial = (shared ? smem.partial() : params.partial) + to * params.head_dim;
        store_row(r, output, [&](int column, float x, float y) {
          *reinterpret_cast<float2*>(partial + column) = {x, y};
        });
        if (place.column == 0) {
          (shared ? smem.sums : params.sums)[to] = {top, sum};
        }
      }
    }
  }
  template <class Put>
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

}  // namespace sparse_fmha::sm90
