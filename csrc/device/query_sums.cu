#include "sparse_fmha/device/query_sums.h"

#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread; head dims are multiples of it

struct Params {
  float4 const* sums;
  void* to;  // [B, L, H, D]
  int64_t items;
  int32_t length;
  int32_t heads;
  int32_t tiles;
  int32_t groups;  // of columns: D / 8
  float scale;
};

// A thread has eight columns of two rows, which are the numbers of four neighboring lanes.
// Neighboring threads have neighboring columns.
template <class Element>
__global__ void __launch_bounds__(kThreads) round_sums(Params const p) {
  int64_t const item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.items) {
    return;
  }
  int const group = static_cast<int>(item % p.groups);
  int64_t rest = item / p.groups;
  int const quad = static_cast<int>(rest % 32);
  rest /= 32;
  int const tile = static_cast<int>(rest % p.tiles);
  int64_t const instance = rest / p.tiles;
  float4 const* const from = p.sums + (rest * p.groups + group) * 128 + quad * 4;
  uint4 rows[2];
  auto* const first = reinterpret_cast<Element*>(&rows[0]);
  auto* const second = reinterpret_cast<Element*>(&rows[1]);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    float4 const x = from[lane];
    first[2 * lane] = Element(x.x * p.scale);
    first[2 * lane + 1] = Element(x.y * p.scale);
    second[2 * lane] = Element(x.z * p.scale);
    second[2 * lane + 1] = Element(x.w * p.scale);
  }
  int64_t const batch = instance / p.heads;
  int64_t const head = instance % p.heads;
  int const row = tile * kSumRows + quad / 8 * 16 + quad % 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + 8 * i < p.length) {
      int64_t const at = (batch * p.length + row + 8 * i) * p.heads + head;
      static_cast<uint4*>(p.to)[at * p.groups + group] = rows[i];
    }
  }
}

int64_t all_tiles(FmhaProblem const& p) {
  return int64_t{num_query_tiles(p)} * p.batch * p.heads_q;
}

}  // namespace

float* new_query_sums(FmhaProblem const& p, ExecutionContext const& context) {
  size_t const bytes = static_cast<size_t>(all_tiles(p)) * kSumRows * p.head_dim * sizeof(float);
  void* const sums = context.memory->allocate(bytes);
  check_cuda(cudaMemsetAsync(sums, 0, bytes, static_cast<cudaStream_t>(context.stream)),
             "clearing the sums of dQ");
  return static_cast<float*>(sums);
}

void round_query_sums(FmhaProblem const& p, ExecutionContext const& context) {
  int32_t const groups = p.head_dim / kColumns;
  Params const params = {reinterpret_cast<float4 const*>(p.gradients->q_sums),
                         p.gradients->q.data,
                         all_tiles(p) * 32 * groups,
                         static_cast<int32_t>(volume(p.grid_q)),
                         p.heads_q,
                         num_query_tiles(p),
                         groups,
                         static_cast<float>(p.scale)};
  unsigned const blocks = grid_size((params.items + kThreads - 1) / kThreads, "the rows of dQ");
  auto const stream = static_cast<cudaStream_t>(context.stream);
  if (p.dtype == DataType::kFloat16) {
    round_sums<cutlass::half_t><<<blocks, kThreads, 0, stream>>>(params);
  } else {
    round_sums<cutlass::bfloat16_t><<<blocks, kThreads, 0, stream>>>(params);
  }
  check_cuda(cudaGetLastError(), "launching the kernel that rounds dQ");
}

}  // namespace sparse_fmha::device
