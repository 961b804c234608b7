// The merge of a group whose pieces are in the shared memory of a cluster of thread blocks.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "sparse_fmha/sm90/decode/finish.h"
#include "sparse_fmha/sm90/decode/pieces.h"
#include "sparse_fmha/sm90/decode/storage.h"

namespace sparse_fmha::sm90 {

// By the consumers of all blocks of a cluster: each lane has four columns of a row of one piece,
// and lanes add up the pieces. Nobody leaves before all have read: memory of a block ends with the
// block.
template <class Traits>
class ClusterMerge {
  using Element = typename Traits::Element;
  using Storage = DecodeStorage<Traits>;
  using Worker = DecodeWorker<Traits>;
  static constexpr int kWorkers = DecodeRoles<Traits>::kWorkers;
  static constexpr int kColumns = 4;

 public:
  // `pieces`: of the group, more than one; worker i of the cluster has piece i.
  static __device__ __forceinline__ void run(DecodeParams const& params, Storage& smem,
                                             DecodeTeam const& team, int32_t pieces) {
    sync(params);
    auto const at = params.group(team.first_group, 0);
    KeyRange const rows = params.keys.rows_of(at.row_group);
    int const quads = params.head_dim / kColumns;
    int const count = (rows.end - rows.begin) * quads;
    int const lanes = team.workers;  // of a row's four columns
    int const shift = __ffs(lanes) - 1;
    int const block = static_cast<int>(blockIdx.x) & (params.cluster - 1);
    int const threads = kWorkers * 128;
    int const thread = block * threads + static_cast<int>(threadIdx.x) - 128;
    int const piece = thread & (lanes - 1);
    Worker& worker = smem.workers[kWorkers > 1 && piece >= params.cluster ? 1 : 0];
    int const from = piece & (params.cluster - 1);
    // Whole warps take turns: `i` of the first lane decides.
    CUTE_NO_UNROLL
    for (int i = thread >> shift; i - (thread % 32 >> shift) < count;
         i += params.cluster * threads >> shift) {
      int const row = min_int(i, count - 1) / quads;
      int const column = min_int(i, count - 1) % quads * kColumns;
      float2 sums = {-INFINITY, 0.f};
      float4 x = {0.f, 0.f, 0.f, 0.f};
      if (piece < pieces) {
        sums = of_block(&worker.sums[row], from);
        x = of_block(
            reinterpret_cast<float4 const*>(worker.partial() + row * params.head_dim + column),
            from);
      }
      float top = sums.x;
      CUTE_NO_UNROLL
      for (int step = lanes / 2; step > 0; step /= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, step));
      }
      float const factor = sums.x == -INFINITY ? 0.f : exp2f(sums.x - top);
      float mine[kColumns + 1] = {x.x, x.y, x.z, x.w, sums.y};
      CUTE_UNROLL
      for (int c = 0; c <= kColumns; ++c) {
        mine[c] *= factor;
      }
      CUTE_NO_UNROLL
      for (int step = lanes / 2; step > 0; step /= 2) {
        CUTE_UNROLL
        for (int c = 0; c <= kColumns; ++c) {
          mine[c] += __shfl_xor_sync(0xffffffff, mine[c], step);
        }
      }
      if (piece == 0 && i < count) {
        DecodeRow const to(params, at, rows.begin + row);
        FinishedRow const end = finish_row(params.keys, to.head, top, mine[kColumns]);
        auto* const out = static_cast<Element*>(params.out.data) + to.offset(params.out) + column;
        CUTE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          out[c] = static_cast<Element>(mine[c] * end.factor);
        }
        if (column == 0) {
          to.store_lse(params, end.lse);
        }
      }
    }
    sync(params);
  }

 private:
  // Of all consumers. In a block without a cluster the barrier of clusters is one of all threads,
  // and the producers may have left.
  static __device__ __forceinline__ void sync(DecodeParams const& params) {
    if (params.cluster > 1) {
      cute::cluster_arrive();
      cute::cluster_wait();
    } else {
      cutlass::arch::NamedBarrier::sync(kWorkers * 128, kPlanningBarrier);
    }
  }
  template <class T>
  static __device__ __forceinline__ T of_block(T const* mine, int block) {
    return *static_cast<T const*>(__cluster_map_shared_rank(mine, block));
  }
};

}  // namespace sparse_fmha::sm90
