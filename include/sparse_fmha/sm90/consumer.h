// A consumer warpgroup: 64 query rows against every key tile of the walk.
#pragma once

#include <cute/tensor.hpp>

#include "sparse_fmha/sm90/epilogue.h"

namespace sparse_fmha::sm90 {

// Puts acc (+)= a * b on the matrix unit; the registers are not to be touched before a wait.
template <bool kAccumulate, class Mma, class A, class B, class C>
__device__ __forceinline__ void issue_mma(Mma mma, A& a, B const& b, C& acc) {
  using namespace cute;
  if constexpr (!is_base_of<GMMA::DescriptorIterator, typename A::engine_type::iterator>::value) {
    warpgroup_fence_operand(a);
  }
  warpgroup_fence_operand(acc);
  warpgroup_arrive();
  mma.accumulate_ = kAccumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    gemm(mma, a(_, _, k), b(_, _, k), acc);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

template <class Traits, class Mechanism>
struct Consumer {
  using Params = KernelParams<Mechanism>;
  using Storage = SharedStorage<Traits>;
  using Element = typename Traits::Element;
  using MmaQK = typename Traits::MmaQK;
  using MmaPV = typename Traits::MmaPV;
  using HeadDim = cute::Int<Traits::kHeadDim>;
  using TileK = cute::Int<Traits::kTileK>;

  Params const& params;
  Storage& smem;
  int const warpgroup;                // among the consumers
  RingState<Traits::kStages> state;   // of the key tile at hand; its value tile has the same

  __device__ __forceinline__ void run() {
    RingState<1> state_q;
    RingState<1> state_work;
    if (Traits::kTakeTurns && warpgroup == 0) {
      give_turn_to(0);
    }
    while (true) {
      smem.ring_work.wait(state_work);
      WorkTile const work = smem.work;
      __syncwarp();
      smem.ring_work.release(state_work);
      state_work.advance();
      if (work.batch < 0) {
        break;
      }
      attend(work, state_q);
    }
    Epilogue<Traits, Mechanism>{params, smem, warpgroup}.wait_for_store();
  }

 private:
  // One query tile.
  __device__ __forceinline__ void attend(WorkTile const& work, RingState<1>& state_q) {
    using namespace cute;
    TileShape const shape = Traits::tile_shape();
    QueryTile const q = Mechanism::query_tile(params.sparsity, shape, work.q_tile);
    auto const walk = Mechanism::walk(params.sparsity, shape, q);
    int const tiles = walk.num_partial + walk.num_full;
    Epilogue<Traits, Mechanism> epilogue{params, smem, warpgroup};
    auto output = partition_fragment_C(MmaPV{}, Shape<_64, HeadDim>{});
    OnlineSoftmax softmax(params.scale_log2);
    float rescale[kRowsPerThread];
    float lse[kRowsPerThread];
    clear(output);

    if (tiles == 0) {
      if constexpr (Traits::kOutputReplacesQ) {
        epilogue.wait_for_store();
        epilogue.sync();
      }
      softmax.finish(rescale, lse);
      epilogue.store(output, lse, work, q.origin[2]);
      return;
    }

    typename Mechanism::Row rows[kRowsPerThread];
    AccumulatorPosition const position;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int const row = warpgroup * 64 + position.row + 8 * r;
      rows[r] = Mechanism::row(params.sparsity, q.residue, {0, 0, q.origin[2] + row});
    }
    auto mask = [&](auto& scores, Coord tile) {
      tile[2] += position.column;
      typename Mechanism::Row const local[kRowsPerThread] = {rows[0].relative_to(tile),
                                                             rows[1].relative_to(tile)};
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        if (!Mechanism::visible(params.sparsity, local[AccumulatorPosition::row_of(i)],
                                {0, 0, AccumulatorPosition::column_of(i)})) {
          scores(i) = -INFINITY;
        }
      }
    };

    auto thread_qk = MmaQK{}.get_slice(threadIdx.x % 128);
    auto thread_pv = MmaPV{}.get_slice(threadIdx.x % 128);
    auto smem_q = local_tile(make_tensor(make_smem_ptr(smem.q), typename Traits::LayoutQ{}),
                             Shape<_64, HeadDim>{}, make_coord(warpgroup, _0{}));
    auto smem_k = make_tensor(make_smem_ptr(smem.k), typename Traits::LayoutK{});
    auto smem_v = make_tensor(make_smem_ptr(smem.v), typename Traits::LayoutVt{});
    auto frag_q = thread_qk.partition_fragment_A(smem_q);
    auto frag_k = thread_qk.partition_fragment_B(smem_k);
    auto frag_v = thread_pv.partition_fragment_B(smem_v);
    // The accumulator of Q.K is, register for register, the first operand of P.V.
    auto weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<TileK{} / 16>>>{});
    auto take_weights = [&](auto const& scores) {
      auto const rounded = convert<Element>(scores);
      CUTE_UNROLL
      for (int i = 0; i < size(rounded); ++i) {
        weights(i) = rounded(i);
      }
    };

    smem.ring_k.wait(state);
    smem.ring_q.wait(state_q);
    if (params.negate) {
      negate_q(epilogue);
    }
    {
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      issue_mma<false>(MmaQK{}, frag_q, frag_k(_, _, _, state.index), scores);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      smem.ring_k.release(state);
      if (walk.num_partial > 0) {
        mask(scores, walk.tile(0));
      }
      softmax.template update<true>(scores, rescale);
      take_weights(scores);
    }

    // Scores of the i-th tile while the weights of the tile before it meet their values.
    auto step = [&](int i, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      RingState<Traits::kStages> const previous = state;
      state.advance();
      auto scores = partition_fragment_C(MmaQK{}, Shape<_64, TileK>{});
      smem.ring_k.wait(state);
      wait_for_turn();
      issue_mma<false>(MmaQK{}, frag_q, frag_k(_, _, _, state.index), scores);
      smem.ring_v.wait(previous);
      issue_mma<true>(MmaPV{}, weights, frag_v(_, _, _, previous.index), output);
      pass_turn();
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      smem.ring_k.release(state);
      if constexpr (kMasked) {
        mask(scores, walk.tile(i));
      }
      softmax.template update<kMasked>(scores, rescale);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(previous);
      take_weights(scores);
      rescale_rows(output, rescale);
    };
    int i = 1;
    CUTE_NO_UNROLL
    for (; i < walk.num_partial; ++i) {
      step(i, true_type{});
    }
    CUTE_NO_UNROLL
    for (; i < tiles; ++i) {
      step(i, false_type{});
    }

    if constexpr (!Traits::kOutputReplacesQ) {
      smem.ring_q.release(state_q);
    }
    smem.ring_v.wait(state);
    issue_mma<true>(MmaPV{}, weights, frag_v(_, _, _, state.index), output);
    softmax.finish(rescale, lse);
    warpgroup_wait<0>();
    warpgroup_fence_operand(output);
    smem.ring_v.release(state);
    state.advance();
    rescale_rows(output, rescale);
    epilogue.store(output, lse, work, q.origin[2]);
    if constexpr (Traits::kOutputReplacesQ) {
      epilogue.wait_for_store();
      epilogue.sync();
      smem.ring_q.release(state_q);
    }
    state_q.advance();
  }

  // softmax(-x) of Q.K is softmax(x) of -Q.K, and the maximum is then the right one.
  __device__ __forceinline__ void negate_q(Epilogue<Traits, Mechanism>& epilogue) {
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      auto* words = reinterpret_cast<uint32_t*>(smem.q + d * Traits::kTileQ + warpgroup * 64 * 64);
      for (int i = threadIdx.x % 128; i < 64 * 64 / 2; i += 128) {
        words[i] ^= 0x80008000u;
      }
    }
    cutlass::arch::fence_view_async_shared();
    epilogue.sync();
  }

  static constexpr int kTurnThreads = 256;  // one warpgroup waits, one arrives
  __device__ __forceinline__ void give_turn_to(int consumer) {
    cutlass::arch::NamedBarrier::arrive(kTurnThreads, consumer);
  }
  __device__ __forceinline__ void wait_for_turn() {
    if constexpr (Traits::kTakeTurns) {
      cutlass::arch::NamedBarrier::sync(kTurnThreads, warpgroup);
    }
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Traits::kTakeTurns) {
      give_turn_to(warpgroup + 1 == Traits::kConsumers ? 0 : warpgroup + 1);
    }
  }
};

}  // namespace sparse_fmha::sm90
