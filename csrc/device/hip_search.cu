// HiP's tree search: one thread block halves, scores and chooses the chunks of one search.
#include "sparse_fmha/device/hip_search.h"

#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/device/choose_largest.h"
#include "sparse_fmha/device/hip_scores.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

// Many searches share multiprocessors, two each; few get all warps for themselves.
constexpr int kThreadsOfMany = 256;
constexpr int kThreadsOfFew = 512;

// A thread's part of `count` things, which are in order among threads.
struct Part {
  int32_t begin;
  int32_t end;
  explicit __device__ __forceinline__ Part(int32_t count) {
    int32_t const each = ceil_div(count, static_cast<int32_t>(blockDim.x));
    begin = min_int(count, static_cast<int32_t>(threadIdx.x) * each);
    end = min_int(count, begin + each);
  }
};

// Keeps the candidates with the largest scores, in order, in place of the scores. Returns their
// number, and whether a chunk was halved.
struct Kept {
  int32_t count;
  bool halved;
};
__device__ __forceinline__ Kept keep_largest(HipSearch const& p, KeyChunk const* chunks,
                                             int32_t candidates, float* scores,
                                             ChoiceMemory& memory) {
  Cut const cut = find_cut(scores, candidates, p.chunks, memory);
  Part const part(candidates);
  static_assert(2 * kMostHipChunks <= 32 * kThreadsOfMany, "a bit for each candidate of a thread");
  // Bits of those above the cut, and of those equal to it.
  uint32_t above = 0;
  uint32_t equal = 0;
  bool halved = false;
  for (int32_t j = part.begin; j < part.end; ++j) {
    uint32_t const order = order_of(scores[j]);
    above |= order > cut.order ? 1u << (j - part.begin) : 0;
    equal |= order == cut.order ? 1u << (j - part.begin) : 0;
    halved |= chunks[j / 2].size() > p.granule;
  }
  Place const place = place_of(static_cast<uint32_t>(__popc(above)) << 16 | __popc(equal), memory);
  bool const any_halved = __syncthreads_or(halved) != 0;  // and all have read the scores
  auto* const to = reinterpret_cast<KeyChunk*>(scores);
  int32_t num_above = static_cast<int32_t>(place.before >> 16);
  int32_t num_equal = static_cast<int32_t>(place.before & 0xffff);
  for (int32_t j = part.begin; j < part.end; ++j, above >>= 1, equal >>= 1) {
    if (above & 1 || (equal & 1 && num_equal < cut.ties)) {
      to[num_above + min_int(num_equal, cut.ties)] = chunks[j / 2].half(j % 2, p.granule);
    }
    num_above += above & 1;
    num_equal += equal & 1;
  }
  __syncthreads();
  int32_t const all_equal = static_cast<int32_t>(place.total & 0xffff);
  return {static_cast<int32_t>(place.total >> 16) + min_int(all_equal, cut.ties), any_halved};
}

__device__ __forceinline__ void write_keys(HipSearch const& p, HipItem const& item,
                                           KeyChunk const* chunks, int32_t count,
                                           ChoiceMemory& memory) {
  int32_t* const to = p.columns + item.list(p) * p.width();
  int32_t const before = item.keys.begin;
  Part const part(count);
  uint32_t own = 0;
  for (int32_t c = part.begin; c < part.end; ++c) {
    own += min_int(chunks[c].size(), p.granule);
  }
  Place const place = place_of(own, memory);
  int32_t at = before + static_cast<int32_t>(place.before);
  for (int32_t c = part.begin; c < part.end; ++c) {
    int32_t const size = min_int(chunks[c].size(), p.granule);
    for (int32_t i = 0; i < size; ++i) {
      to[at++] = chunks[c].begin + i;
    }
  }
  for (int32_t i = threadIdx.x; i < before; i += blockDim.x) {
    to[i] = i;
  }
  int32_t const total = before + static_cast<int32_t>(place.total);
  for (int32_t i = total + static_cast<int32_t>(threadIdx.x); i < p.width(); i += blockDim.x) {
    to[i] = -1;
  }
  if (threadIdx.x == 0) {
    p.counts[item.list(p)] = total;
  }
}

// Searches that share keys are next to each other, so that they find them in the L2 cache: the
// heads of a key head, then the groups.
__device__ __forceinline__ HipItem item_of(HipSearch const& p) {
  int32_t const shared = p.heads_q / p.heads_kv;
  int32_t rest = blockIdx.x;
  int32_t const head = rest % shared;
  rest /= shared;
  int32_t const group = rest % p.groups();
  rest /= p.groups();
  return {p, rest / p.heads_kv, rest % p.heads_kv * shared + head, group};
}

// Chunks, or the scores of their halves.
constexpr size_t kBytesOfChunk = sizeof(KeyChunk);
static_assert(kBytesOfChunk == 2 * sizeof(float));

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreadsOfFew, 1) search_keys(HipSearch const p) {
  using Scores = HipScores<Element, kDim>;
  extern __shared__ uint4 shared[];
  __shared__ ChoiceMemory memory;
  uint4* const rows = shared;
  auto* chunks = reinterpret_cast<KeyChunk*>(shared + Scores::kRowBytes / sizeof(uint4));
  KeyChunk* others = chunks + p.chunks;
  HipItem const item = item_of(p);
  int32_t const num_rows = p.rows(item.group);
  for (int32_t c = threadIdx.x; c < p.chunks; c += blockDim.x) {
    chunks[c] = item.chunk(p, c);
  }
  Scores::load_rows(p, item, 0, rows);
  __syncthreads();
  Kept kept = {item.keys.size() == 0 ? 0 : p.chunks, true};
#pragma unroll 1
  for (int32_t i = 0; i < p.halvings && kept.count > 0 && kept.halved; ++i) {
    auto* const scores = reinterpret_cast<float*>(others);
    for (int32_t first = 0; first < num_rows; first += Scores::kRows) {
      if (num_rows > Scores::kRows && i + first > 0) {
        __syncthreads();
        Scores::load_rows(p, item, first, rows);
        __syncthreads();
      }
      Scores::join(p, item, chunks, 2 * kept.count, first, rows, scores);
    }
    __syncthreads();
    kept = keep_largest(p, chunks, 2 * kept.count, scores, memory);
    others = chunks;
    chunks = reinterpret_cast<KeyChunk*>(scores);
  }
  write_keys(p, item, chunks, kept.count, memory);
}

template <class Body>
void with_types(HipSearch const& p, Body const& body) {
  if (p.dtype != DataType::kFloat32) {
    with_mma_types(p.dtype, p.head_dim, body);
  } else if (p.head_dim <= 128) {
    body(float(), std::integral_constant<int, 128>());
  } else {
    body(float(), std::integral_constant<int, 256>());
  }
}

}  // namespace

void find_hip_keys(HipSearch const& p, ExecutionContext const& context) {
  char const* const what = "HiP's search for keys";
  int64_t const searches = p.searches();
  int const threads = searches <= multiprocessor_count() ? kThreadsOfFew : kThreadsOfMany;
  with_types(p, [&](auto element, auto dim) {
    using Element = decltype(element);
    constexpr int kDim = decltype(dim)::value;
    auto* const kernel = &search_keys<Element, kDim>;
    size_t const bytes = HipScores<Element, kDim>::kRowBytes + 2 * p.chunks * kBytesOfChunk;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "raising the shared-memory limit");
    kernel<<<grid_size(searches, what), threads, bytes,
             static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), what);
}

}  // namespace sparse_fmha::device
