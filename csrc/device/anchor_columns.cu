// Lists of the set bits.
#include "sparse_fmha/device/anchor_kernels.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// One thread block per list. A bit's position in the list is the number of bits before it, so the
// order is deterministic.
__global__ void __launch_bounds__(kThreads) list_bits(AnchorColumns const p) {
  __shared__ int32_t ends[kWarps];
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;
  int64_t const list = blockIdx.x;
  uint32_t const* const words = p.bits + list * p.words;
  int32_t* const to = p.columns + list * p.width;
  int32_t written = 0;
  for (int32_t first = 0; first < p.words && written < p.width; first += kThreads) {
    int32_t const word = first + static_cast<int32_t>(threadIdx.x);
    uint32_t bits = word < p.words ? words[word] : 0;
    int32_t const mine = __popc(bits);
    int32_t end = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int32_t const before = __shfl_up_sync(kWholeWarp, end, step);
      end += lane >= step ? before : 0;
    }
    if (lane == 31) {
      ends[warp] = end;
    }
    __syncthreads();
    int32_t place = written + end - mine;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      place += other < warp ? ends[other] : 0;
      written += ends[other];
    }
    __syncthreads();
    for (; bits != 0 && place < p.width; bits &= bits - 1) {
      to[place++] = p.first + word * 32 + __ffs(bits) - 1;
    }
  }
  written = min_int(written, p.width);
  for (int32_t i = written + static_cast<int32_t>(threadIdx.x); i < p.width; i += kThreads) {
    to[i] = -1;
  }
  if (threadIdx.x == 0) {
    p.counts[list] = written;
  }
}

}  // namespace

void anchor_columns(AnchorColumns const& p, ExecutionContext const& context) {
  list_bits<<<grid_size(p.lists, "the listing of keys"), kThreads, 0,
              static_cast<cudaStream_t>(context.stream)>>>(p);
  check_cuda(cudaGetLastError(), "launching the listing of keys");
}

}  // namespace sparse_fmha::device
