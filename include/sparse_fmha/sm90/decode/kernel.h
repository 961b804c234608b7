// Decode attention of up to 64 packed rows: a warpgroup gathers keys and values with cp.async, row
// by row, and one computes. The form of the keys only decides where a row is.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/gather.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/tile_traits.h"
#include "sparse_fmha/sm90/decode/params.h"
#include "sparse_fmha/sm90/forward/operands.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct DecodeStorage {
  using Element = typename Traits::Element;
  static constexpr int kTileElements = Traits::kTileK * Traits::kHeadDim;
  alignas(1024) Element q[Traits::kTileQ * Traits::kHeadDim];
  alignas(1024) Element k[Traits::kStages * kTileElements];
  alignas(1024) Element v[Traits::kStages * kTileElements];
  int32_t positions[Traits::kStages][Traits::kTileK];  // -1: no key that a row sees
  Ring<Traits::kStages> ring_k;
  Ring<Traits::kStages> ring_v;
};

// What a part has of a group.
struct DecodePiece {
  DecodeParams::Group at;
  KeyRange tiles;
  int64_t place;
};

// Calls body(piece) for the pieces of this block's parts, in the same order in every thread.
template <class Body>
__device__ __forceinline__ void for_each_piece(DecodeParams const& params, Body body) {
  DecodeParts const cut = params.parts(gridDim.x);
  int32_t const unit_tiles = params.unit_tiles();
  for (int64_t part = blockIdx.x; part < cut.parts; part += gridDim.x) {
    int64_t unit = cut.begin(part);
    int64_t const end = cut.begin(part + 1);
    int32_t group = decode_group_of(params.first, params.groups, unit);
    while (unit < end) {
      int64_t const first = params.first[group];
      int64_t const next = params.first[group + 1];
      int64_t const stop = next < end ? next : end;
      if (unit < stop) {
        KeyRange const all = params.tiles[group];
        int64_t const from = all.begin + (unit - first) * unit_tiles;
        int64_t const to = all.begin + (stop - first) * unit_tiles;
        body(DecodePiece{params.group(group),
                         {static_cast<int32_t>(from),
                          static_cast<int32_t>(to < all.end ? to : int64_t{all.end})},
                         DecodeParts::place(part, group)});
        unit = stop;
      }
      ++group;
    }
  }
}

// A warp copies 16 rows of each tile: four at a time, eight lanes to a row.
template <class Traits>
struct DecodeProducer {
  using Element = typename Traits::Element;
  static constexpr int kRowsOfWarp = Traits::kTileK / 4;
  static_assert(kRowsOfWarp == 16, "a lane looks up one row");

  DecodeParams const& params;
  DecodeStorage<Traits>& smem;
  RingState<Traits::kStages> state = {};

  __device__ __forceinline__ void run() {
    for_each_piece(params, [&](DecodePiece const& piece) { load(piece); });
  }

 private:
  __device__ __forceinline__ void load(DecodePiece const& piece) {
    DecodeKeys const& keys = params.keys;
    auto const& at = piece.at;
    int const lane = threadIdx.x % 32;
    int const first_row = threadIdx.x % 128 / 32 * kRowsOfWarp;
    KeyRange const rows = keys.rows_of(at.row_group);
    KeyRange const range = keys.range(at.batch, at.head);
    int32_t const first_query = rows.begin / keys.group;
    int32_t const last_query = (rows.end - 1) / keys.group;
    KeyRange const some_see = {keys.visible(range, first_query).begin,
                               keys.visible(range, last_query).end};
    int32_t const slots = keys.slots(range, at.batch, first_query, at.head);
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin; tile < piece.tiles.end; ++tile, state.advance()) {
      int32_t position = -1;
      int64_t outer = at.batch;
      int64_t row = 0;
      int64_t const slot = int64_t{tile} * Traits::kTileK + first_row + lane;
      if (lane < kRowsOfWarp && slot < slots) {
        position = keys.position(range, at.batch, first_query, at.head, static_cast<int32_t>(slot));
        if (position < some_see.begin || position >= some_see.end ||
            !in_some_tree(range, at.batch, first_query, last_query, position)) {
          position = -1;
        } else if (keys.page > 0) {
          outer = keys.page_table.at(at.batch, 0, at.head, position / keys.page);
          row = position % keys.page;
          position = outer >= 0 && outer < keys.pages ? position : -1;
        } else {
          row = position;
        }
      }
      bool const there = position >= 0;
      smem.ring_k.acquire(state);
      if (lane < kRowsOfWarp) {
        smem.positions[state.index][first_row + lane] = position;
      }
      auto* const k = smem.k + state.index * DecodeStorage<Traits>::kTileElements;
      copy_rows(params.k, at.head, outer, row, there, first_row, k);
      arrive_when_gathered(smem.ring_k.full[state.index]);
      smem.ring_k.full[state.index].arrive();  // the positions are written
      smem.ring_v.acquire(state);
      auto* const v = smem.v + state.index * DecodeStorage<Traits>::kTileElements;
      copy_rows(params.v, at.head, outer, row, there, first_row, v);
      arrive_when_gathered(smem.ring_v.full[state.index]);
    }
  }

  __device__ __forceinline__ bool in_some_tree(KeyRange range, int32_t batch, int32_t first_query,
                                               int32_t last_query, int32_t position) const {
    bool seen = params.keys.tree.data == nullptr;
    for (int32_t query = first_query; query <= last_query && !seen; ++query) {
      seen = params.keys.in_tree(range, batch, query, position);
    }
    return seen;
  }

  // Rows that are not there become zeros: a weight of 0 does not make NaN of them.
  __device__ __forceinline__ void copy_rows(TensorView const& from, int32_t head, int64_t outer,
                                            int64_t row, bool there, int first_row,
                                            Element* stage) const {
    int const chunk = threadIdx.x % 8;
    int64_t const mine = there ? outer * from.batch_stride + row * from.axis_stride[kGridAxes - 1] +
                                     head * from.head_stride
                               : -1;
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfWarp; i += 4) {
      int const r = i + threadIdx.x % 32 / 8;
      int64_t const offset = __shfl_sync(0xffffffff, mine, r);
      bool const is_there = __shfl_sync(0xffffffff, int{there}, r) != 0;
      auto const* const source = static_cast<Element const*>(from.data) + (is_there ? offset : 0);
      CUTE_UNROLL
      for (int d = 0; d < Traits::kHeadDim; d += 64) {
        int const column = d + chunk * 8;
        bool const reads = is_there && column < params.head_dim;
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            stage + swizzled_place(first_row + r, column, Traits::kTileK),
            source + (reads ? column : 0), reads);
      }
    }
  }
};

template <class Traits>
struct DecodeConsumer {
  using Element = typename Traits::Element;
  DecodeParams const& params;
  DecodeStorage<Traits>& smem;
  RingState<Traits::kStages> state = {};

  __device__ __forceinline__ void run() {
    for_each_piece(params, [&](DecodePiece const& piece) { attend(piece); });
  }

 private:
  static __device__ __forceinline__ void sync() {
    constexpr int kBarrier = 1;
    cutlass::arch::NamedBarrier::sync(128, kBarrier);
  }

  __device__ __forceinline__ void load_queries(DecodeParams::Group const& at, KeyRange rows) {
    sync();  // the products with the last queries are done in all warps
    uint32_t const sign = params.negate ? 0x80008000u : 0;
    for (int i = threadIdx.x % 128; i < 64 * Traits::kHeadDim / 8; i += 128) {
      int const r = i / (Traits::kHeadDim / 8);
      int const column = i % (Traits::kHeadDim / 8) * 8;
      int32_t const row = rows.begin + r;
      uint4 x = {0, 0, 0, 0};
      if (row < rows.end && column < params.head_dim) {
        int32_t const query = row / params.keys.group;
        int32_t const head = at.head * params.keys.group + row % params.keys.group;
        auto const* const from =
            static_cast<Element const*>(params.q.data) + at.batch * params.q.batch_stride +
            query * params.q.axis_stride[kGridAxes - 1] + head * params.q.head_stride + column;
        x = *reinterpret_cast<uint4 const*>(from);
        x = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
      }
      *reinterpret_cast<uint4*>(smem.q + swizzled_place(r, column, 64)) = x;
    }
    cutlass::arch::fence_view_async_shared();
    sync();
  }

  __device__ __forceinline__ void attend(DecodePiece const& piece) {
    using namespace cute;
    DecodeKeys const& keys = params.keys;
    auto const& at = piece.at;
    KeyRange const rows = keys.rows_of(at.row_group);
    KeyRange const range = keys.range(at.batch, at.head);
    load_queries(at, rows);
    AccumulatorPosition const place;
    int32_t query[kRowsPerThread];
    KeyRange seen[kRowsPerThread];
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = rows.begin + place.row + 8 * r;
      query[r] = min_int(row, rows.end - 1) / keys.group;
      seen[r] = row < rows.end ? keys.visible(range, query[r]) : KeyRange{0, 0};
    }
    auto frag_q = operand_q<Traits>(smem.q, 0);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_v<Traits>(smem.v);
    Weights<Traits> weights;
    auto output =
        partition_fragment_C(typename Traits::MmaPV{}, Shape<_64, Int<Traits::kHeadDim>>{});
    clear(output);
    OnlineSoftmax softmax(params.scale_log2);
    float rescale[kRowsPerThread];
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin; tile < piece.tiles.end; ++tile, state.advance()) {
      auto scores =
          partition_fragment_C(typename Traits::MmaQK{}, Shape<_64, Int<Traits::kTileK>>{});
      smem.ring_k.wait(state);
      cutlass::arch::fence_view_async_shared();  // cp.async wrote what WGMMA reads
      issue_mma<false, Traits::kScoreSteps>(typename Traits::MmaQK{}, frag_q,
                                            frag_k(_, _, _, state.index), scores);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      int32_t const* const positions = smem.positions[state.index] + place.column;
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        int const r = AccumulatorPosition::row_of(i);
        int32_t const position = positions[AccumulatorPosition::column_of(i)];
        bool sees = position >= seen[r].begin && position < seen[r].end;
        if (keys.tree.data != nullptr && sees) {
          sees = keys.in_tree(range, at.batch, query[r], position);
        }
        scores(i) = sees ? scores(i) : -INFINITY;
      }
      __syncwarp();
      smem.ring_k.release(state);
      if (softmax.template update<true>(scores, rescale)) {
        rescale_rows(output, rescale);
      }
      convert_into(scores, weights);
      smem.ring_v.wait(state);
      cutlass::arch::fence_view_async_shared();
      issue_mma<true, Traits::kTileK / 16>(typename Traits::MmaPV{}, weights,
                                           frag_v(_, _, _, state.index), output);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(state);
    }
    store(piece.place, rows.end - rows.begin, softmax, output);
  }

  template <class Output>
  __device__ __forceinline__ void store(int64_t at, int32_t rows, OnlineSoftmax const& softmax,
                                        Output const& output) const {
    AccumulatorPosition const place;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int32_t const row = place.row + 8 * r;
      float const sum = reduce_quad(softmax.row_sum[r], [](float a, float b) { return a + b; });
      if (row >= rows) {
        continue;
      }
      int64_t const to = at * params.rows + row;
      if (place.column == 0) {
        params.sums[to] = {softmax.row_max[r] * params.scale_log2, sum};
      }
      CUTE_UNROLL
      for (int i = 2 * r; i < cute::size(output); i += 4) {
        int const column = place.column + AccumulatorPosition::column_of(i);
        if (column < params.head_dim) {
          *reinterpret_cast<float2*>(params.partial + to * params.head_dim + column) = {
              output(i), output(i + 1)};
        }
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(256, 1)
    decode_attention_kernel(DecodeParams const __grid_constant__ params) {
  extern __shared__ __align__(1024) char raw_smem[];
  auto& smem = *reinterpret_cast<DecodeStorage<Traits>*>(raw_smem);
  if (threadIdx.x == 0) {
    smem.ring_k.init(4, 2 * 128);  // copies, and positions
    smem.ring_v.init(4, 128);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    DecodeProducer<Traits>{params, smem}.run();
  } else {
    DecodeConsumer<Traits>{params, smem}.run();
  }
}

}  // namespace sparse_fmha::sm90
