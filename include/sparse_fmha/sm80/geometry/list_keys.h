// Geometry of the dK/dV kernel for mechanisms with lists of keys.
//
// Lists are transposed on the device beforehand (device/transposed_lists.h): for each part of 64
// keys, a bitmap says which steps of 64 query rows see it. A key tile has one or two parts, and a
// step that any part needs is copied. A thread block takes all or half of a step's rows at a time.
// Names are those of geometry/sequence_keys.h.
#pragma once

#include "sparse_fmha/device/transposed_lists.h"
#include "sparse_fmha/sm80/backward/dkv/run_kernel.h"
#include "sparse_fmha/sm80/backward/traits.h"
#include "sparse_fmha/sm80/forward/copy_tile.h"
#include "sparse_fmha/sm80/geometry/contract.h"

namespace sparse_fmha::sm80 {

template <class Traits, class Mechanism>
struct ListKeys {
  using Element = typename Traits::Element;
  static constexpr int kParts = Traits::kTileK / kPartKeys;
  static constexpr int kSplit = kStepRows / Traits::kTileQ;  // tiles of a step's rows
  static constexpr int kFound = 32;                          // steps that are found at a time
  static_assert(kParts * kPartKeys == Traits::kTileK && (kParts == 1 || kParts == 2),
                "key tiles are one or two parts of the transposed lists");
  static_assert(kSplit * Traits::kTileQ == kStepRows && (kSplit == 1 || kSplit == 2),
                "query tiles are steps of the transposed lists, or half of them");

  struct Params {
    TransposedLists lists;
  };
  struct Step {
    int32_t number;  // of the query rows
    int32_t head;    // in the group
    PartUse uses[kParts];
  };
  struct Shared {
    Step steps[2 * kFound];  // the set in use and the next
    // Of the step that is computed and the next: for each key, 16 bits for each of the four threads
    // that hold its columns.
    alignas(8) uint16_t seen[2][Traits::kTileK][4];
    int32_t word;   // from which on steps are to be found, over all heads of the group
    uint32_t left;  // those of this word
  };
  struct Work {
    int32_t batch;
    int32_t head_kv;
    int32_t key_tile;
    int32_t tiles;  // of queries, over all heads of the group
  };

  DkvParams<ListKeys, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ Work begin(WorkTile const& tile) const {
    auto const& lists = params.geometry.lists;
    int64_t const list =
        tile.batch * int64_t{lists.batch_stride_kv} + tile.head * lists.head_stride;
    int64_t const first = list * lists.key_tiles;
    // The scheduler counts down.
    int32_t const key_tile = lists.order[first + lists.key_tiles - 1 - tile.q_tile];
    if (threadIdx.x == 0) {
      shared.word = 0;
      shared.left = 0xffffffff;
    }
    __syncthreads();
    return {tile.batch, tile.head, key_tile, lists.counts[3 * (first + key_tile)] * kSplit};
  }
  __device__ __forceinline__ TokenRows<Element> keys(Work const& work,
                                                     TensorView const& view) const {
    return {sm80::head_of<Element>(view, work.batch, work.head_kv), view.axis_stride[kGridAxes - 1],
            first_key(work), params.sparsity.len_kv};
  }
  __device__ __forceinline__ int64_t key_row(Work const& work, int r) const {
    int32_t const token = first_key(work) + r;
    int32_t const length = params.sparsity.len_kv;
    return token < length ? (int64_t{work.batch} * length + token) * params.heads_kv + work.head_kv
                          : -1;
  }

  __device__ __forceinline__ int64_t key_index(Work const& work, int r) const {
    int32_t const token = first_key(work) + r;
    return token < params.sparsity.len_kv ? token : -1;
  }

  __device__ __forceinline__ int32_t head(Work const& work, int i) const {
    return head_of(work, step_at(i).head);
  }
  __device__ __forceinline__ int steps(Work const& work) const { return work.tiles; }
  // A warp finds the steps of a set. Each lane reads one word of the bitmaps.
  __device__ __forceinline__ void place(Work const& work, int i) const {
    if (i % (kFound * kSplit) == 0 && i < work.tiles && threadIdx.x < 32) {
      find_steps(work, i / kSplit);
    }
  }
  __device__ __forceinline__ TokenRows<Element> queries(Work const& work, int i) const {
    return rows(work, i, params.q);
  }
  __device__ __forceinline__ TokenRows<Element> douts(Work const& work, int i) const {
    return rows(work, i, params.dout);
  }
  __device__ __forceinline__ int64_t query_row(Work const& work, int i, int r) const {
    int32_t const token = first_query(i) + r;
    int32_t const length = params.sparsity.len_q;
    return token < length ? (int64_t{work.batch} * length + token) * params.heads_q +
                                head_of(work, step_at(i).head)
                          : -1;
  }
  // A warp finds which of 32 keys each query of half a step sees, and transposes the bits.
  __device__ __forceinline__ void write_mask(Work const& work, int i) const {
    if (i % kSplit != 0 || i >= work.tiles) {
      return;
    }
    Step const& step = step_at(i);
    bool masked = false;
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      masked |= step.uses[part].masked;
    }
    if (!masked) {
      return;
    }
    auto const& s = params.sparsity;
    auto const& lists = params.geometry.lists;
    int32_t const query = step.number * kStepRows;
    int64_t const row = list_of(work, step.head) * ceil_div(s.len_q, s.block_q) + query / s.block_q;
    int32_t const lane = static_cast<int32_t>(threadIdx.x % 32);
    int32_t const mine = lane < tile_entries(s, Traits::kTileK)
                             ? tile_entry(s, lists, row, first_key(work), lane)
                             : kNoBlock;
    auto entry = [&](int32_t n) { return __shfl_sync(0xffffffff, mine, n); };
    CUTE_NO_UNROLL
    for (int n = threadIdx.x / 32; n < Traits::kTileK / 16; n += Traits::kWarps) {
      int const half = n % 2;
      int const first = n / 2 * 32;
      uint32_t bits = seen_keys(s, lists, row, entry, first_key(work), first,
                                query + query_of_lane(half, lane));
      CUTE_UNROLL
      for (int distance = 16; distance > 0; distance /= 2) {
        bits = exchange(bits, __shfl_xor_sync(0xffffffff, bits, distance), lane, distance);
      }
      reinterpret_cast<uint32_t*>(seen_at(i)[first + lane])[half] = bits;
    }
  }
  __device__ __forceinline__ bool needs(Work const& /*work*/, int i, int row) const {
    return step_at(i).uses[row / kPartKeys].seen;
  }
  __device__ __forceinline__ bool is_masked(Work const& /*work*/, int i, int row) const {
    return step_at(i).uses[row / kPartKeys].masked;
  }
  class Mask {
   public:
    __device__ __forceinline__ Mask(ListKeys const& lists, Work const& /*work*/, int row)
        : lists_(lists), row_(row) {}
    using Seen = SeenColumns;
    __device__ __forceinline__ Seen look_up(int i) const {
      auto const* const seen = lists_.seen_at(i);
      int const shift = i % kSplit * (Traits::kTileQ / 4);
      int const thread = static_cast<int>(threadIdx.x % 4);
      return {{uint32_t{seen[row_][thread]} >> shift, uint32_t{seen[row_ + 8][thread]} >> shift}};
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) { return seen.sees(i); }

   private:
    ListKeys const& lists_;
    int const row_;
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context) {
    DkvParams<ListKeys, Mechanism> params;
    params.sparsity = std::get<typename Mechanism::Params>(p.sparsity);
    params.geometry = {device::transpose_lists(params.sparsity, p, kParts, context)};
    Gradients const& g = *p.gradients;
    run_dkv_kernel<Traits>(params, p, {p.k, p.v, g.k, g.v}, params.geometry.lists.key_tiles,
                           params.sparsity.len_q, context);
  }

 private:
  __device__ __forceinline__ int32_t first_key(Work const& work) const {
    return work.key_tile * Traits::kTileK;
  }
  __device__ __forceinline__ Step const& step_at(int i) const {
    return shared.steps[i / kSplit % (2 * kFound)];
  }
  __device__ __forceinline__ uint16_t (*seen_at(int i) const)[4] {
    return shared.seen[i / kSplit % 2];
  }
  __device__ __forceinline__ int32_t first_query(int i) const {
    return step_at(i).number * kStepRows + i % kSplit * Traits::kTileQ;
  }
  __device__ __forceinline__ int32_t head_of(Work const& work, int32_t head) const {
    return work.head_kv * params.heads_per_kv + head;
  }
  __device__ __forceinline__ int64_t list_of(Work const& work, int32_t head) const {
    auto const& lists = params.geometry.lists;
    return work.batch * int64_t{lists.batch_stride} + head_of(work, head) * lists.head_stride;
  }
  __device__ __forceinline__ TokenRows<Element> rows(Work const& work, int i,
                                                     TensorView const& view) const {
    return {sm80::head_of<Element>(view, work.batch, head_of(work, step_at(i).head)),
            view.axis_stride[kGridAxes - 1], first_query(i), params.sparsity.len_q};
  }

  // By a whole warp: up to kFound steps, the first of which has index `first`.
  __device__ __forceinline__ void find_steps(Work const& work, int first) const {
    auto const& lists = params.geometry.lists;
    int const lane = static_cast<int>(threadIdx.x);
    int32_t const words = lists.step_words * params.heads_per_kv;
    int32_t word = shared.word;
    uint32_t left_of_word = shared.left;
    int found = 0;
    while (found < kFound && word < words) {
      int32_t const mine = word + lane;
      int32_t const head = mine / lists.step_words;
      int32_t const in_head = mine % lists.step_words;
      uint32_t seen[kParts] = {};
      uint32_t masked[kParts] = {};
      uint32_t left = 0;
      if (mine < words) {
        int64_t const row = list_of(work, head) * lists.parts + int64_t{work.key_tile} * kParts;
        CUTE_UNROLL
        for (int part = 0; part < kParts; ++part) {
          int64_t const at = (row + part) * lists.step_words + in_head;
          seen[part] = lists.seen[at];
          masked[part] = lists.masked[at];
          left |= seen[part];
        }
      }
      left &= lane == 0 ? left_of_word : 0xffffffff;
      int end = count_bits(left);  // of this lane's steps
      CUTE_UNROLL
      for (int distance = 1; distance < 32; distance *= 2) {
        int const before = __shfl_up_sync(0xffffffff, end, distance);
        end += lane >= distance ? before : 0;
      }
      int const all = __shfl_sync(0xffffffff, end, 31);
      for (int n = found + end - count_bits(left); left != 0 && n < kFound; ++n) {
        int const bit = lowest_bit(left & (~left + 1));
        left &= left - 1;
        Step& step = shared.steps[(first + n) % (2 * kFound)];
        step.number = in_head * 32 + bit;
        step.head = head;
        CUTE_UNROLL
        for (int part = 0; part < kParts; ++part) {
          step.uses[part] = {(seen[part] >> bit & 1) != 0, (masked[part] >> bit & 1) != 0};
        }
      }
      found += all;
      uint32_t const unfinished = __ballot_sync(0xffffffff, left != 0);
      int const next = unfinished == 0 ? 32 : __ffs(static_cast<int>(unfinished)) - 1;
      left_of_word = unfinished == 0 ? 0xffffffff : __shfl_sync(0xffffffff, left, next);
      word += next;
    }
    __syncwarp();  // all lanes have read where to begin
    if (lane == 0) {
      shared.word = word;
      shared.left = left_of_word;
    }
  }
};

}  // namespace sparse_fmha::sm80
