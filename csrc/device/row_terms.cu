// For each query row, lse in log2 units, delta = sum(out * dout) - dlse, and what products start
// with instead (sm90/backward/row_terms.h); reads out and dout once.
#include "sparse_fmha/device/row_terms.h"

#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // 16-bit elements that a lane reads at once
constexpr float kLog2e = 1.44269504088896340736f;

struct RowTermsParams {
  void const* out;  // contiguous
  TensorView dout;
  float const* lse;
  float const* dlse;  // or nullptr
  float4* to;
  int64_t rows;
  Coord grid;
  int32_t heads;
  int32_t dim;  // of a row
  float scale_log2;
};

template <class Element>
__device__ __forceinline__ float dot(uint4 const& a, uint4 const& b) {
  auto const* const x = reinterpret_cast<Element const*>(&a);
  auto const* const y = reinterpret_cast<Element const*>(&b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    sum = fmaf(static_cast<float>(x[i]), static_cast<float>(y[i]), sum);
  }
  return sum;
}

// Each row has kLanes lanes, a power of two that covers the head.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kThreads) find_row_terms(RowTermsParams const p) {
  int const lane = threadIdx.x % kLanes;
  int64_t const row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  bool const inside = row < p.rows;
  float sum = 0;
  if (inside && lane * kElements < p.dim) {
    int64_t rest = row / p.heads;
    int64_t from = row % p.heads * p.dout.head_stride + lane * kElements;
#pragma unroll
    for (int axis = kGridAxes - 1; axis >= 0; --axis) {
      from += rest % p.grid[axis] * p.dout.axis_stride[axis];
      rest /= p.grid[axis];
    }
    from += rest * p.dout.batch_stride;
    int64_t const at = row * p.dim + lane * kElements;
    sum = dot<Element>(
        *reinterpret_cast<uint4 const*>(static_cast<Element const*>(p.out) + at),
        *reinterpret_cast<uint4 const*>(static_cast<Element const*>(p.dout.data) + from));
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, step);
  }
  if (inside && lane == 0) {
    float const lse = p.lse[row];
    bool const sees = lse != -INFINITY;  // else weight and gradient are 0 for any dout
    float const delta = sum - (p.dlse == nullptr ? 0.f : p.dlse[row]);
    float const lse_log2 = sees ? lse * kLog2e : INFINITY;
    p.to[row] = {lse_log2, sees ? delta : 0.f, -lse_log2 / p.scale_log2, sees ? -delta : 0.f};
  }
}

}  // namespace

void fill_row_terms(FmhaProblem const& problem, ExecutionContext const& context) {
  Gradients const& g = *problem.gradients;
  RowTermsParams const params = {problem.out.data,
                                 g.out,
                                 problem.lse,
                                 g.lse,
                                 reinterpret_cast<float4*>(g.row_terms),
                                 volume(problem.grid_q) * problem.batch * problem.heads_q,
                                 problem.grid_q,
                                 problem.heads_q,
                                 problem.value_dim,
                                 static_cast<float>(problem.scale) * kLog2e};
  with_mma_types(problem.dtype, problem.value_dim, [&](auto element, auto dim) {
    constexpr int kLanes = decltype(dim)::value / kElements;
    int64_t const blocks = (params.rows * kLanes + kThreads - 1) / kThreads;
    find_row_terms<decltype(element), kLanes>
        <<<grid_size(blocks, "the rows of the backward pass"), kThreads, 0,
           static_cast<cudaStream_t>(context.stream)>>>(params);
  });
  check_cuda(cudaGetLastError(), "launching the kernel of row terms");
}

}  // namespace sparse_fmha::device
