// Quest's choice of pages: a kernel that reads all bounds once and writes a score for each page,
// and one that chooses, with a thread block for each request and key head.
#include "sparse_fmha/device/quest_pages.h"

#include <algorithm>

#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/choose_largest.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 2;  // pages whose bounds a thread has on their way
constexpr int kBlocks = 4;  // of a multiprocessor
constexpr int kMostRounds = 8;
constexpr int kMostDims = 256;
constexpr int kThreadsOfChoice = 512;
constexpr int32_t kMostInShared = 10240;  // scores: 40 KB

__device__ __forceinline__ float query_at(QuestPages const& p, int64_t offset) {
  switch (p.q_dtype) {
    case DataType::kFloat16:
      return static_cast<float>(static_cast<cutlass::half_t const*>(p.q.data)[offset]);
    case DataType::kBFloat16:
      return static_cast<float>(static_cast<cutlass::bfloat16_t const*>(p.q.data)[offset]);
    case DataType::kFloat32:
      return static_cast<float const*>(p.q.data)[offset];
    default:
      return static_cast<float>(static_cast<double const*>(p.q.data)[offset]);
  }
}

// 16 bytes of a row.
template <class Element>
struct alignas(16) Piece {
  static constexpr int kWidth = 16 / sizeof(Element);
  Element x[kWidth];
};

// `lanes` threads, a power of two, share a page. Key heads of the same pages are neighbors in the
// grid, as their bounds are in memory. A thread block scores pages in `rounds`, as the sums of
// queries take as long as reading some pages.
template <class Element>
__global__ void __launch_bounds__(kThreads, kBlocks)
    score_pages(QuestPages const __grid_constant__ p, int lanes, int rounds, int32_t chunks) {
  using Some = Piece<Element>;
  __shared__ float above[kMostDims];
  __shared__ float below[kMostDims];
  int32_t const head = blockIdx.x % p.heads_kv;
  int32_t const chunk = blockIdx.x / p.heads_kv % chunks;
  int32_t const entry = blockIdx.x / p.heads_kv / chunks;
  int32_t const slots = kThreads / lanes;
  int32_t const first = chunk * rounds * slots * kAtOnce;
  int32_t const newest = p.newest(entry);
  if (first >= newest) {
    return;
  }
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float sum_above = 0;
    float sum_below = 0;
    for (int32_t i = 0; i < p.group(); ++i) {
      float const x = query_at(p, p.query(entry, int64_t{head} * p.group() + i) + d);
      sum_above += x < 0 ? 0.f : x;  // and NaN
      sum_below += x < 0 ? x : 0.f;
    }
    above[d] = sum_above;
    below[d] = sum_below;
  }
  __syncthreads();

  int const lane = threadIdx.x % lanes;
  int32_t const end = min_int(newest, first + rounds * slots * kAtOnce);
  // All threads of a warp are in each round.
  for (int32_t round = first; round < end; round += slots * kAtOnce) {
    int32_t const own = round + static_cast<int32_t>(threadIdx.x) / lanes;
    int32_t places[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int32_t const at = own + i * slots;
      places[i] = at < end ? p.place(entry, at) : -1;
    }
    float sums[kAtOnce] = {};
    for (int d = lane * Some::kWidth; d < p.head_dim; d += lanes * Some::kWidth) {
      Some low[kAtOnce] = {};
      Some high[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (places[i] >= 0) {
          low[i] = *reinterpret_cast<Some const*>(p.row<Element>(p.low, places[i], head) + d);
          high[i] = *reinterpret_cast<Some const*>(p.row<Element>(p.high, places[i], head) + d);
        }
      }
#pragma unroll
      for (int j = 0; j < Some::kWidth; ++j) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sums[i] += above[d + j] * static_cast<float>(high[i].x[j]) +
                     below[d + j] * static_cast<float>(low[i].x[j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      for (int step = 1; step < lanes; step *= 2) {
        sums[i] += __shfl_xor_sync(0xffffffff, sums[i], step);
      }
      int32_t const at = own + i * slots;
      if (lane == 0 && at < end) {
        p.scores[p.list(entry, head) * p.width + at] = places[i] >= 0 ? sums[i] : -INFINITY;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreadsOfChoice)
    choose_pages(QuestPages const __grid_constant__ p) {
  extern __shared__ float copied[];
  __shared__ ChoiceMemory memory;
  int64_t const list = blockIdx.x;
  int32_t const newest = p.newest(static_cast<int32_t>(list / p.heads_kv));
  int32_t const count = max_int(0, newest);
  float const* scores = p.scores + list * p.width;
  if (p.width <= kMostInShared) {
    for (int32_t i = threadIdx.x; i < count; i += kThreadsOfChoice) {
      copied[i] = scores[i];
    }
    scores = copied;
    __syncthreads();
  }
  Cut const cut = p.best > 0 ? find_cut(scores, count, p.best, memory) : Cut{UINT32_MAX, 0};
  // A thread's pages follow each other, and so do those that it writes.
  int32_t const each = ceil_div(count, kThreadsOfChoice);
  int32_t const begin = min_int(count, static_cast<int32_t>(threadIdx.x) * each);
  int32_t const end = min_int(count, begin + each);
  uint32_t above = 0;
  uint32_t equal = 0;
  for (int32_t i = begin; i < end; ++i) {
    uint32_t const order = order_of(scores[i]);
    above += order > cut.order ? 1 : 0;
    equal += order == cut.order ? 1 : 0;
  }
  Place const place_above = place_of(above, memory);
  __syncthreads();
  Place const place_equal = place_of(equal, memory);
  int32_t* const to = p.indices + list * (int64_t{p.best} + 1) + 1;
  auto num_above = static_cast<int32_t>(place_above.before);
  auto num_equal = static_cast<int32_t>(place_equal.before);
  for (int32_t i = begin; i < end; ++i) {
    uint32_t const order = order_of(scores[i]);
    if (order > cut.order || (order == cut.order && num_equal < cut.ties)) {
      to[num_above + min_int(num_equal, cut.ties)] = i;
    }
    num_above += order > cut.order ? 1 : 0;
    num_equal += order == cut.order ? 1 : 0;
  }
  int32_t const found = static_cast<int32_t>(place_above.total) +
                        min_int(static_cast<int32_t>(place_equal.total), cut.ties);
  for (int32_t i = found + static_cast<int32_t>(threadIdx.x); i < p.best; i += kThreadsOfChoice) {
    to[i] = -1;
  }
  if (threadIdx.x == 0) {
    to[-1] = newest;
    p.counts[list] = found + (newest >= 0 ? 1 : 0);
  }
}

template <class Element>
void score(QuestPages const& p, ExecutionContext const& context) {
  int lanes = 1;
  while (lanes < 32 && lanes * Piece<Element>::kWidth < p.head_dim) {
    lanes *= 2;
  }
  // As many rounds as leave all multiprocessors their blocks.
  int32_t const of_round = kAtOnce * (kThreads / lanes);
  int64_t const lists = int64_t{p.batch} * p.heads_kv;
  int64_t const most = lists * ceil_div(p.width, of_round);
  int const rounds = static_cast<int>(
      std::clamp<int64_t>(most / (kBlocks * multiprocessor_count()), 1, kMostRounds));
  int32_t const chunks = ceil_div(p.width, rounds * of_round);
  int64_t const blocks = lists * chunks;
  if (blocks > 0) {
    score_pages<Element><<<grid_size(blocks, "scores of pages"), kThreads, 0,
                           static_cast<cudaStream_t>(context.stream)>>>(p, lanes, rounds, chunks);
    check_cuda(cudaGetLastError(), "launching the scores of pages");
  }
}

}  // namespace

void choose_quest_pages(QuestPages const& p, ExecutionContext const& context) {
  if (p.dtype == DataType::kFloat16) {
    score<cutlass::half_t>(p, context);
  } else if (p.dtype == DataType::kBFloat16) {
    score<cutlass::bfloat16_t>(p, context);
  } else {
    score<float>(p, context);
  }
  size_t const bytes = p.width <= kMostInShared ? p.width * sizeof(float) : 0;
  choose_pages<<<grid_size(int64_t{p.batch} * p.heads_kv, "a choice of pages"), kThreadsOfChoice,
                 bytes, static_cast<cudaStream_t>(context.stream)>>>(p);
  check_cuda(cudaGetLastError(), "launching the choice of pages");
}

}  // namespace sparse_fmha::device
