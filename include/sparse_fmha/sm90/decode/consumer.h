// A consumer of a decode kernel: every second tile of each piece. The first consumer then merges
// both results.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/decode/finish.h"
#include "sparse_fmha/sm90/decode/pieces.h"
#include "sparse_fmha/sm90/decode/storage.h"
#include "sparse_fmha/sm90/forward/operands.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct DecodeConsumer {
  using Element = typename Traits::Element;
  using Output = decltype(cute::partition_fragment_C(
      typename Traits::MmaPV{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));

  DecodeParams const& params;
  DecodeStorage<Traits>& smem;
  int const warpgroup;  // 0 or 1
  RingState<Traits::kStages> state = {};

  __device__ __forceinline__ void attend(DecodePiece const& piece) {
    KeyRange const rows = params.keys.rows_of(piece.at.row_group);
    load_queries(piece.at, rows);
    Output output;
    cute::clear(output);
    OnlineSoftmax softmax(params.scale_log2);
    walk(piece, rows, softmax, output);
    if (piece.count() > 1) {
      merge(softmax, output);
    }
    if (warpgroup == 0) {
      store(piece, rows, softmax, output);
    }
  }

  // The outputs of the groups without keys, shared by the consumers of all blocks.
  __device__ __forceinline__ void store_empty_groups(DecodePlan const& plan) const {
    int32_t const begin = blockIdx.x * DecodeRoles::kConsumers + warpgroup;
    CUTE_NO_UNROLL
    for (int32_t group = begin; group < params.groups;
         group += gridDim.x * DecodeRoles::kConsumers) {
      if (plan.first[group] == plan.first[group + 1]) {
        store_empty(params.group(group));
      }
    }
  }

 private:
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

  enum Barrier { kBothBarrier = 1, kOwnBarrier = 2 };  // and the next, one for each consumer
  static __device__ __forceinline__ void sync_both() {
    cutlass::arch::NamedBarrier::sync(DecodeRoles::kConsumerThreads, kBothBarrier);
  }

  __device__ __forceinline__ void load_queries(DecodeParams::Group const& at, KeyRange rows) {
    sync_both();  // the last piece is done
    uint32_t const sign = params.negate ? 0x80008000u : 0;
    CUTE_NO_UNROLL
    for (int i = threadIdx.x - 128; i < 64 * Traits::kHeadDim / 8;
         i += DecodeRoles::kConsumerThreads) {
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
    sync_both();
  }

  // Afterwards `state` is that of the next piece.
  __device__ __forceinline__ void walk(DecodePiece const& piece, KeyRange rows,
                                       OnlineSoftmax& softmax, Output& output) {
    using namespace cute;
    auto frag_q = operand_q<Traits>(smem.q, 0);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_v<Traits>(smem.v);
    Weights<Traits> weights;
    float rescale[kRowsPerThread];
    if (warpgroup == 1) {
      state.advance();
    }
    int32_t tile = piece.tiles.begin + warpgroup;
    CUTE_NO_UNROLL
    for (; tile < piece.tiles.end; tile += 2) {
      auto scores =
          partition_fragment_C(typename Traits::MmaQK{}, Shape<_64, Int<Traits::kTileK>>{});
      smem.ring_k.wait(state);
      cutlass::arch::fence_view_async_shared();  // cp.async wrote what WGMMA reads
      issue_mma<false, Traits::kScoreSteps>(typename Traits::MmaQK{}, frag_q,
                                            frag_k(_, _, _, state.index), scores);
      bool const masked = *reinterpret_cast<uint32_t const*>(smem.masked[state.index]) != 0;
      bool hidden_row = false;
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      if (masked) {
        hidden_row = smem.positions[state.index][threadIdx.x % 128 / 2] < 0;
        hide(piece, rows, scores);
      }
      __syncwarp();
      smem.ring_k.release(state);
      if (softmax.template update<true>(scores, rescale)) {
        rescale_rows(output, rescale);
      }
      convert_into(scores, weights);
      smem.ring_v.wait(state);
      if (masked) {
        clear_row(hidden_row);
      }
      cutlass::arch::fence_view_async_shared();
      issue_mma<true, Traits::kTileK / 16>(typename Traits::MmaPV{}, weights,
                                           frag_v(_, _, _, state.index), output);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(state);
      state.advance();
      state.advance();
    }
    if (tile > piece.tiles.end) {
      state.retreat();
    }
  }

  // Hides the keys of a masked tile from the rows that do not see them.
  template <class Scores>
  __device__ __forceinline__ void hide(DecodePiece const& piece, KeyRange rows,
                                       Scores& scores) const {
    DecodeKeys const& keys = params.keys;
    KeyRange const range = keys.range(piece.at.batch, piece.at.head);
    AccumulatorPosition const place;
    int32_t query[kRowsPerThread];
    KeyRange seen[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = rows.begin + place.row + 8 * r;
      query[r] = min_int(row, rows.end - 1) / keys.group;
      seen[r] = row < rows.end ? keys.visible(range, query[r]) : KeyRange{0, 0};
    }
    uint32_t const in_trees = keys.tree.data != nullptr ? tree_bits(range, piece, query) : ~0u;
    int32_t const* const positions = smem.positions[state.index];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      int const r = AccumulatorPosition::row_of(i);
      int32_t const position = positions[place.column + AccumulatorPosition::column_of(i)];
      bool const sees = position >= seen[r].begin && position < seen[r].end && (in_trees >> i & 1);
      scores(i) = sees ? scores(i) : -INFINITY;
    }
  }
  // A bit for each score of the thread: whether the tree shows its query the key.
  __device__ __forceinline__ uint32_t tree_bits(KeyRange range, DecodePiece const& piece,
                                                int32_t const (&query)[kRowsPerThread]) const {
    static_assert(Traits::kTileK / 2 == 32, "a thread has 32 scores");
    AccumulatorPosition const place;
    uint32_t bits = 0;
    CUTE_NO_UNROLL
    for (int i = 0; i < 32; ++i) {
      int32_t const position =
          smem.positions[state.index][place.column + AccumulatorPosition::column_of(i)];
      int32_t const asks = AccumulatorPosition::row_of(i) == 0 ? query[0] : query[1];
      bool const shown =
          position >= 0 && params.keys.in_tree(range, piece.at.batch, asks, position);
      bits |= uint32_t{shown} << i;
    }
    return bits;
  }

  // Zeroes the values of the keys that no row sees: two threads to a row. A weight of zero does not
  // make a number of NaN.
  __device__ __forceinline__ void clear_row(bool hidden) const {
    if (hidden) {
      int const row = threadIdx.x % 128 / 2;
      auto* const stage = smem.values(state.index);
      CUTE_NO_UNROLL
      for (int column = threadIdx.x % 2 * 8; column < Traits::kHeadDim; column += 16) {
        *reinterpret_cast<uint4*>(stage + swizzled_place(row, column, Traits::kTileK)) = {0, 0, 0,
                                                                                          0};
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, kOwnBarrier + warpgroup);
  }

  // Adds the second consumer's result to the first one's, through the memory of the queries, which
  // holds half of an output.
  __device__ __forceinline__ void merge(OnlineSoftmax& softmax, Output& output) const {
    constexpr int kHalf = decltype(cute::size(output))::value / 2;
    static_assert(kHalf % 4 == 0, "halves are copied in chunks of 16 bytes");
    int const thread = threadIdx.x % 128;
    auto* const shared = reinterpret_cast<float4*>(smem.q);
    float factor[2][kRowsPerThread];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      sync_both();  // the queries, or the first half, were read
      if (warpgroup == 1) {
        CUTE_UNROLL
        for (int i = 0; i < kHalf; i += 4) {
          int const j = half * kHalf + i;
          shared[i / 4 * 128 + thread] = {output(j), output(j + 1), output(j + 2), output(j + 3)};
        }
        if (half == 0) {
          smem.second[thread] = {softmax.row_max[0], softmax.row_max[1], softmax.row_sum[0],
                                 softmax.row_sum[1]};
        }
      }
      sync_both();
      if (warpgroup == 1) {
        continue;
      }
      if (half == 0) {
        float4 const other = smem.second[thread];
        float const tops[kRowsPerThread] = {other.x, other.y};
        float const sums[kRowsPerThread] = {other.z, other.w};
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          float const top = fmaxf(softmax.row_max[r], tops[r]);
          factor[0][r] = factor_of(softmax.row_max[r], top);
          factor[1][r] = factor_of(tops[r], top);
          softmax.row_max[r] = top;
          softmax.row_sum[r] = softmax.row_sum[r] * factor[0][r] + sums[r] * factor[1][r];
        }
      }
      CUTE_UNROLL
      for (int i = 0; i < kHalf; i += 4) {
        float4 const other = shared[i / 4 * 128 + thread];
        float const x[4] = {other.x, other.y, other.z, other.w};
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          int const r = AccumulatorPosition::row_of(j);
          float& mine = output(half * kHalf + i + j);
          mine = mine * factor[0][r] + x[j] * factor[1][r];
        }
      }
    }
  }
  __device__ __forceinline__ float factor_of(float reference, float top) const {
    return reference == -INFINITY ? 0.f : exp2_approx((reference - top) * params.scale_log2);
  }

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
      if (piece.alone) {
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
        int64_t const to = piece.place * params.rows + row - rows.begin;
        float* const partial = params.partial + to * params.head_dim;
        store_row(r, output, [&](int column, float x, float y) {
          *reinterpret_cast<float2*>(partial + column) = {x, y};
        });
        if (place.column == 0) {
          params.sums[to] = {top, sum};
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
