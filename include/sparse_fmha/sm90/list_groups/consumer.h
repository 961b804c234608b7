// A consumer warpgroup of the kernel for groups: one query block of 64 rows against the key blocks
// that it sees.
#pragma once

#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/common/negate.h"
#include "sparse_fmha/sm90/forward/operands.h"
#include "sparse_fmha/sm90/geometry/query_rows.h"
#include "sparse_fmha/sm90/list_groups/storage.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct GroupConsumer {
  using Element = typename Traits::Element;
  using Slot = GroupSlot<Traits>;

  GroupParams<Traits> const& params;
  GroupStorage<Traits>& smem;
  int const member;
  uint32_t begun = 0;  // tiles whose copies had begun when last looked

  __device__ __forceinline__ void run() {
    uint32_t first = 0;    // entries of earlier groups
    uint32_t phase_q = 0;  // a group may have fewer members
    for (uint32_t n = 0;; ++n) {
      GroupWork const work = smem.take(n);
      if (work.tile.batch < 0) {
        break;
      }
      if (first_row(work) < params.len_q) {
        attend(work, first, phase_q);
        phase_q ^= 1;
      }
      first += static_cast<uint32_t>(work.count);
    }
    if (leads()) {
      cute::tma_store_wait<0>();
    }
  }

 private:
  // The entries that the member sees, by number.
  struct Own {
    GroupChunks chunks;
    int const member;
    uint32_t first;     // number of the chunk's first entry
    int32_t left;       // entries in later chunks
    uint32_t seen = 0;  // those left of the chunk
    GroupEntry mine{};  // the lane's
    int32_t lane = 0;   // of the entry that next() found last

    __device__ __forceinline__ Own(GroupWork const& work, int member, uint32_t first)
        : chunks(work), member(member), first(first - 32), left(work.count) {}
    __device__ __forceinline__ bool next(uint32_t& number) {
      while (seen == 0) {
        if (left <= 0) {
          return false;
        }
        left -= 32;
        first += 32;
        mine = chunks.next();
        seen = __ballot_sync(0xffffffff, mine.members() >> member & 1);
      }
      lane = __ffs(seen) - 1;
      number = first + lane;
      seen &= seen - 1;
      return true;
    }
    __device__ __forceinline__ GroupEntry entry() const {
      return {__shfl_sync(0xffffffff, mine.word, lane)};
    }
  };

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 128 == 0; }
  __device__ __forceinline__ int first_row(GroupWork const& work) const {
    return (work.tile.q_tile * Traits::kMembers + member) * ListGroup::kBlock;
  }
  __device__ __forceinline__ Element* queries() const {
    return smem.q + member * Traits::kTileElements;
  }
  __device__ __forceinline__ void sync() const {
    cutlass::arch::NamedBarrier::sync(128, 1 + member);
  }
  __device__ __forceinline__ void release(uint32_t index) {
    if (threadIdx.x % 32 == 0) {
      smem.empty[index].arrive();
    }
  }

  __device__ __forceinline__ void attend(GroupWork const& work, uint32_t first, uint32_t phase_q) {
    using namespace cute;
    auto& full_q = smem.full_q[member];
    if (leads()) {
      tma_store_wait<0>();  // of the output that lay there
      full_q.arrive_and_expect_tx(Traits::kBytes);
      load_box<128>(params.q, full_q, queries(), ListGroup::kBlock, kReadOnce, first_row(work),
                    work.tile.head, work.tile.batch);
    }
    auto output = partition_fragment_C(typename Traits::MmaPV{}, Shape<_64, _128>{});
    clear(output);
    device::OnlineSoftmax softmax(params.scale_log2);
    float rescale[device::kRowsPerThread];
    Own own(work, member, first);
    full_q.wait(phase_q);
    if (params.negate) {
      negate_rows<Traits>(queries(), 0);
      sync();
    }
    walk(own, softmax, output);
    float lse[device::kRowsPerThread];
    softmax.finish(rescale, lse);
    device::rescale_rows(output, rescale);
    if (threadIdx.x % 4 == 0) {  // four threads hold the same rows
      visit_sequence_rows(params.lse, first_row(work) + device::AccumulatorPosition().row,
                          work.tile, params.len_q, params.heads_q,
                          [&](int r, float& to) { to = lse[r]; });
    }
    store(output, work);
  }

  // Waits until the tile with this number has landed. Tells first whether its copy has begun: the
  // barrier's phase has one bit, and a consumer may be more than one turn of the ring ahead.
  __device__ __forceinline__ uint32_t reach(uint32_t tile) {
    while (static_cast<int32_t>(tile - begun) >= 0) {
      begun = smem.tiles_begun();
    }
    Slot const slot(tile);
    smem.full[slot.index].wait(slot.phase);
    return slot.index;
  }

  template <class Output>
  __device__ __forceinline__ void walk(Own& own, device::OnlineSoftmax& softmax, Output& output) {
    using namespace cute;
    using device::AccumulatorPosition;
    using device::kRowsPerThread;
    typename Traits::MmaQK const mma_qk;
    typename Traits::MmaPV const mma_pv;
    auto frag_q = operand_q<Traits>(queries(), 0);
    auto frag_k = operand_k<Traits>(smem.ring);
    auto frag_v = operand_v<Traits>(smem.ring);
    float rescale[kRowsPerThread];
    Weights<Traits> weights;
    bool pending = false;   // whether the weights have not been multiplied yet
    uint32_t previous = 0;  // the entry that they are of
    auto multiply = [&] {
      uint32_t const values = reach(2 * previous + 1);
      issue_mma<true, ListGroup::kBlock / 16>(mma_pv, weights, frag_v(_, _, _, values), output);
      return values;
    };
    auto end_multiply = [&](uint32_t values) {
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      release(values);
    };
    uint32_t number;
    CUTE_NO_UNROLL
    while (own.next(number)) {
      auto scores = partition_fragment_C(mma_qk, Shape<_64, _64>{});
      bool moved;
      // The values of weights that wait for far keys would hold up the ring.
      if (!pending || number - previous > Traits::kNear) {
        if (pending) {
          end_multiply(multiply());
        }
        uint32_t const keys = reach(2 * number);
        issue_mma<false, Traits::kScoreSteps>(mma_qk, frag_q, frag_k(_, _, _, keys), scores);
        // Only the first entry may end behind the last key.
        int32_t const limit =
            params.len_kv - own.entry().block() * ListGroup::kBlock - AccumulatorPosition().column;
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
        release(keys);
        device::hide_scores(scores, [&](int i, float x) {
          return AccumulatorPosition::column_of(i) < limit ? x : -INFINITY;
        });
        moved = softmax.template update<true>(scores, rescale);
        pending = true;
      } else {
        uint32_t const keys = reach(2 * number);
        issue_mma<false, Traits::kScoreSteps>(mma_qk, frag_q, frag_k(_, _, _, keys), scores);
        uint32_t const values = multiply();
        warpgroup_wait<1>();
        warpgroup_fence_operand(scores);
        release(keys);
        moved = softmax.template update<false>(scores, rescale);
        end_multiply(values);
      }
      convert_into(scores, weights);
      if (moved) {
        device::rescale_rows(output, rescale);
      }
      previous = number;
    }
    if (pending) {
      end_multiply(multiply());
    }
  }

  template <class Output>
  __device__ __forceinline__ void store(Output const& output, GroupWork const& work) {
    using namespace cute;
    auto tile = make_tensor(make_smem_ptr(queries()), typename Traits::LayoutQ{});
    auto copy_out =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaPV{});
    auto thread_copy = copy_out.get_slice(threadIdx.x % 128);
    auto rounded = convert<Element>(output);
    sync();  // all warps have read the queries
    cute::copy(copy_out, thread_copy.retile_S(rounded),
               thread_copy.partition_D(as_position_independent_swizzle_tensor(tile)));
    tma_store_fence();
    sync();
    if (leads()) {
      store_rows<128, ListGroup::kBlock>(params.out, queries(), first_row(work), work.tile);
      tma_store_arrive();
    }
  }
};

}  // namespace sparse_fmha::sm90
