// How the consumer of a worker walks over the tiles of a piece.
#pragma once

#include "sparse_fmha/device/decode/cap_scores.h"
#include "sparse_fmha/device/decode/tile_mask.h"
#include "sparse_fmha/device/skip_vote.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/common/convert.h"
#include "sparse_fmha/sm90/common/issue.h"
#include "sparse_fmha/sm90/decode/clear_values.h"
#include "sparse_fmha/sm90/forward/operands.h"

namespace sparse_fmha::sm90 {

template <class Traits>
using DecodeScores = decltype(cute::partition_fragment_C(
    typename Traits::MmaQK{}, cute::Shape<cute::_64, cute::Int<Traits::kTileK>>{}));
template <class Traits>
using DecodeOutput = decltype(cute::partition_fragment_C(
    typename Traits::MmaPV{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));

// All tiles count.
template <class Traits>
struct DecodeWalk {
  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const worker;  // of the block
  RingState<Traits::kStages> state = {};

  __device__ __forceinline__ void run(DecodePiece const& piece, KeyRange rows,
                                      OnlineSoftmax& softmax, DecodeOutput<Traits>& output) {
    using namespace cute;
    auto frag_q = operand_q<Traits>(smem.q, 0);
    auto frag_k = operand_k<Traits>(smem.k);
    auto frag_v = operand_v<Traits>(smem.v);
    Weights<Traits> weights;
    float rescale[kRowsPerThread];
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin; tile < piece.tiles.end; ++tile, state.advance()) {
      DecodeScores<Traits> scores;
      smem.ring_k.wait(state);
      cutlass::arch::fence_view_async_shared();  // cp.async wrote what WGMMA reads
      issue_mma<false, Traits::kScoreSteps>(typename Traits::MmaQK{}, frag_q,
                                            frag_k(_, _, _, state.index), scores);
      bool const masked = smem.is_masked(state.index);
      bool hidden_row = false;
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      cap_scores(params, scores);
      if (masked) {
        DecodeTileMask<Traits> const mask{params, piece, rows, smem.positions[state.index]};
        hidden_row = mask.hides_row();
        mask.hide(scores);
      }
      compiler_fence();
      __syncwarp();
      smem.ring_k.release(state);
      if (softmax.template update<true>(scores, rescale)) {
        rescale_rows(output, rescale);
      }
      convert_into(scores, weights);
      smem.ring_v.wait(state);
      if (masked) {
        clear_hidden_row<Traits>(smem.values(state.index), hidden_row, worker);
      }
      cutlass::arch::fence_view_async_shared();
      issue_mma<true, Traits::kTileK / 16>(typename Traits::MmaPV{}, weights,
                                           frag_v(_, _, _, state.index), output);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output);
      smem.ring_v.release(state);
    }
  }
};

// The rows vote on each tile. The values of a tile are copied if it is kept, and are multiplied
// when the weights of the next kept tile are known, so that their copy is not waited for. The
// softmax does not know of that: the weights of a tile keep the factor that belongs before them.
template <class Traits>
struct VotingDecodeWalk {
  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const worker;  // of the block
  RingState<Traits::kStages> keys = {};
  RingState<Traits::kValueStages> values = {};
  VoteQueue::State votes = {};

  __device__ __forceinline__ void run(DecodePiece const& piece, KeyRange rows,
                                      OnlineSoftmax& softmax, DecodeOutput<Traits>& output) {
    using namespace cute;
    auto frag_q = operand_q<Traits>(smem.q, 0);
    auto frag_k = operand_k<Traits>(smem.k);
    WorkTile const of_piece = {0, piece.at.head, piece.at.batch};
    TileVote vote(params.skip, of_piece, params.scale_log2, worker,
                  [&](int r) { return rows.begin + AccumulatorPosition{}.row + 8 * r < rows.end; });
    Kept kept;
    bool has_kept = false;
    CUTE_NO_UNROLL
    for (int32_t tile = piece.tiles.begin; tile < piece.tiles.end; ++tile, keys.advance()) {
      DecodeScores<Traits> scores;
      smem.ring_k.wait(keys);
      cutlass::arch::fence_view_async_shared();  // cp.async wrote what WGMMA reads
      issue_mma<false, Traits::kScoreSteps>(typename Traits::MmaQK{}, frag_q,
                                            frag_k(_, _, _, keys.index), scores);
      bool const masked = smem.is_masked(keys.index);
      bool hidden_row = false;
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      cap_scores(params, scores);
      if (masked) {
        DecodeTileMask<Traits> const mask{params, piece, rows, smem.positions[keys.index]};
        hidden_row = mask.hides_row();
        mask.hide(scores);
      }
      compiler_fence();
      __syncwarp();
      smem.ring_k.release(keys);
      float high[kRowsPerThread];
      OnlineSoftmax::own_tops(scores, high);
      bool const left_out =
          masked ? vote.template leaves_out<true>(high) : vote.template leaves_out<false>(high);
      if (threadIdx.x % 128 == 0) {
        smem.votes.queue.put(votes, left_out ? 0 : 1);
      }
      __syncwarp();
      if (left_out) {
        continue;
      }
      OnlineSoftmax::share_tops(high);
      vote.keep(high);
      Kept now;
      now.moved = softmax.template update<true>(scores, high, now.rescale);
      now.masked = masked;
      now.hidden_row = hidden_row;
      Weights<Traits> weights;
      convert_into(scores, weights);
      if (has_kept) {
        add_values(kept, output);
      }
      keep(weights);
      kept = now;
      has_kept = true;
    }
    if (has_kept) {
      add_values(kept, output);
    }
    vote.add_to(params.skip, of_piece);
  }

 private:
  // A kept tile whose values are not multiplied yet. Its weights are in shared memory, because the
  // largest outputs leave no registers for them.
  struct Kept {
    float rescale[kRowsPerThread];  // of the output before it, if `moved`
    bool moved;
    bool masked;
    bool hidden_row;
  };
  static_assert(sizeof(Weights<Traits>) == sizeof(uint4[4]), "the weights of a thread");

  __device__ __forceinline__ void keep(Weights<Traits> const& weights) const {
    auto const* const from = reinterpret_cast<uint32_t const*>(weights.data());
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      smem.votes.weights[i][threadIdx.x % 128] = {from[4 * i], from[4 * i + 1], from[4 * i + 2],
                                                  from[4 * i + 3]};
    }
  }
  __device__ __forceinline__ void add_values(Kept const& kept, DecodeOutput<Traits>& output) {
    using namespace cute;
    auto frag_v = operand_v<Traits>(smem.v);
    Weights<Traits> weights;
    auto* const to = reinterpret_cast<uint32_t*>(weights.data());
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint4 const x = smem.votes.weights[i][threadIdx.x % 128];
      to[4 * i] = x.x;
      to[4 * i + 1] = x.y;
      to[4 * i + 2] = x.z;
      to[4 * i + 3] = x.w;
    }
    if (kept.moved) {
      rescale_rows(output, kept.rescale);
    }
    smem.ring_v.wait(values);
    if (kept.masked) {
      clear_hidden_row<Traits>(smem.values(values.index), kept.hidden_row, worker);
    }
    cutlass::arch::fence_view_async_shared();
    issue_mma<true, Traits::kTileK / 16>(typename Traits::MmaPV{}, weights,
                                         frag_v(_, _, _, values.index), output);
    warpgroup_wait<0>();
    warpgroup_fence_operand(output);
    smem.ring_v.release(values);
    values.advance();
  }
};

}  // namespace sparse_fmha::sm90
