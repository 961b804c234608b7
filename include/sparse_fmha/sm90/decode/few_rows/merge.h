// The end of a group: the warps of its blocks have parts of its keys, which are merged in order.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "sparse_fmha/device/decode/finish.h"
#include "sparse_fmha/device/softmax.h"
#include "sparse_fmha/sm90/decode/few_rows/params.h"
#include "sparse_fmha/sm90/decode/few_rows/storage.h"

namespace sparse_fmha::sm90 {

// Stores to the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_in_block(void* here, uint32_t block, float4 x) {
  uint32_t const there = cute::set_block_rank(cute::cast_smem_ptr_to_uint(here), block);
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_in_block(void* here, uint32_t block, float2 x) {
  uint32_t const there = cute::set_block_rank(cute::cast_smem_ptr_to_uint(here), block);
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(x.x), "f"(x.y)
               : "memory");
}

// Outputs of one row that are being added up.
struct MergedRow {
  float top = -INFINITY;  // in log2 units
  float sum = 0.f;
  float4 out = {0.f, 0.f, 0.f, 0.f};

  // parts(i) is the i-th part's reference and sum; outputs(i) its four outputs.
  template <class Parts, class Outputs>
  __device__ __forceinline__ MergedRow(int count, Parts parts, Outputs outputs) {
    for (int i = 0; i < count; ++i) {
      top = fmaxf(top, parts(i).x);
    }
    for (int i = 0; i < count; ++i) {
      float2 const part = parts(i);
      float const factor = part.x == -INFINITY ? 0.f : exp2_approx(part.x - top);
      float4 const x = outputs(i);
      sum += part.y * factor;
      out.x += x.x * factor;
      out.y += x.y * factor;
      out.z += x.z * factor;
      out.w += x.w * factor;
    }
  }
};

template <class Traits>
struct FewRowsMerge {
  using Storage = FewRowsStorage<Traits>;
  static constexpr int kFours = Traits::kHeadDim / 4;  // of a row

  FewRowsParams const& params;
  Storage& smem;
  DecodeParams::Group const& at;
  KeyRange const rows;
  int const block;  // of the group

  template <class Output>
  __device__ __forceinline__ void put(OnlineSoftmax const& softmax, Output const& output) const {
    int const warp = threadIdx.x / 32;
    int const lane = threadIdx.x % 32;
    __syncthreads();  // stages and outputs share memory
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      int const row = lane / 4 + 8 * r;
      float const sum = reduce_quad(softmax.row_sum[r], [](float a, float b) { return a + b; });
      if (row >= rows.end - rows.begin) {
        continue;
      }
      if (lane % 4 == 0) {
        smem.of_warps[warp].sums[row] = {softmax.row_max[r] * params.scale_log2, sum};
      }
      CUTE_UNROLL
      for (int i = 0; i < cute::size(output); i += 4) {
        int const column = lane % 4 * 2 + AccumulatorPosition::column_of(i);
        *reinterpret_cast<float2*>(&smem.outputs[warp][row * Storage::kRowFloats + column]) = {
            output(i + 2 * r), output(i + 2 * r + 1)};
      }
    }
    __syncthreads();
  }

  // Merges what put() took, and stores the group's results.
  __device__ __forceinline__ void finish() const {
    int const count = (rows.end - rows.begin) * kFours;
    // The elements that each block finishes.
    int const share = ceil_div(count, params.blocks);
    if (params.blocks > 1) {
      cute::cluster_wait();  // the other blocks have begun: their memory can be written
    }
    CUTE_NO_UNROLL
    for (int i = threadIdx.x; i < count; i += Traits::kThreads) {
      int const row = i / kFours;
      MergedRow const merged(
          Traits::kWarps, [&](int w) { return smem.of_warps[w].sums[row]; },
          [&](int w) {
            return *reinterpret_cast<float4 const*>(
                &smem.outputs[w][row * Storage::kRowFloats + i % kFours * 4]);
          });
      if (params.blocks == 1) {
        store(i, merged);
        continue;
      }
      store_in_block(&smem.received[block * share + i % share], i / share, merged.out);
      if (i % kFours < params.blocks) {  // one thread for each block
        store_in_block(&smem.of_blocks[block].sums[row], i % kFours,
                       float2{merged.top, merged.sum});
      }
    }
    if (params.blocks == 1) {
      return;
    }
    cute::cluster_arrive();
    cute::cluster_wait();
    CUTE_NO_UNROLL
    for (int i = threadIdx.x; i < share && block * share + i < count; i += Traits::kThreads) {
      int const element = block * share + i;
      store(element,
            MergedRow(
                params.blocks, [&](int b) { return smem.of_blocks[b].sums[element / kFours]; },
                [&](int b) { return smem.received[b * share + i]; }));
    }
  }

 private:
  static_assert(kFours >= Traits::kMostBlocks, "a row's threads send its sums to all blocks");

  __device__ __forceinline__ void store(int element, MergedRow const& merged) const {
    int32_t const row = element / kFours;
    int const column = element % kFours * 4;
    DecodeRow const to(params, at, rows.begin + row);
    FinishedRow const end = finish_row(params.keys, to.head, merged.top, merged.sum);
    auto* const out =
        static_cast<typename Traits::Element*>(params.out.data) + to.offset(params.out);
    float const values[4] = {merged.out.x, merged.out.y, merged.out.z, merged.out.w};
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      if (column + c < params.head_dim) {
        out[column + c] = static_cast<typename Traits::Element>(values[c] * end.factor);
      }
    }
    if (column == 0) {
      to.store_lse(params, end.lse);
    }
  }
};

}  // namespace sparse_fmha::sm90
