// One bit per distant key: whether a query block of a superblock keeps it.
#include "sparse_fmha/device/anchor_kernels.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kRows = 64;  // per thread block: query blocks of the heads that share keys
constexpr int kWarpRows = 16;
constexpr int kRunKeys = 4096;  // per thread block

template <int kDim>
constexpr int kKeys = kDim == 256 ? 64 : 128;  // per tile
template <int kDim>
constexpr size_t kSmemBytes = 2 * kKeys<kDim> * kDim * sizeof(uint16_t);

constexpr SPARSE_FMHA_HD int32_t heads_of_part(AnchorGrid const& grid, int32_t group) {
  return min_int(group, kRows / grid.step);
}

// Splits each mean into two rows, the leading bits and the remainder. The sum of their products
// with a key is that of the mean up to 2^-16 of a bf16 mean and 2^-22 of an fp16 one. The largest
// number of a row is scaled to [1/2, 1), so that the remainder does not underflow, and `least` is
// scaled with it. Row h * step + j is block j of head h.
template <int kDim, class Element>
__device__ __forceinline__ void split_means(AnchorKeys const& p, int32_t batch, int32_t first_head,
                                            int32_t heads, int32_t first_block, int32_t blocks,
                                            Element* leading, Element* rest, float* least) {
  int const lane = threadIdx.x % 32;
  auto const* const means = static_cast<float const*>(p.q_mean.data);
  for (int row = threadIdx.x / 32; row < kRows; row += kMmaWarps) {
    int32_t const head = first_head + row / p.grid.step;
    int32_t const block = row % p.grid.step;
    bool const there = row / p.grid.step < heads && block < blocks;
    float x[kDim / 32];
    float most = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      int const d = i * 32 + lane;
      x[i] = there && d < p.head_dim
                 ? means[batch * p.q_mean.batch_stride + head * p.q_mean.head_stride +
                         (first_block + block) * p.q_mean.axis_stride[kGridAxes - 1] + d]
                 : 0.f;
      most = fmaxf(most, fabsf(x[i]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, step));
    }
    int exponent = 0;
    if (most > 0 && most < INFINITY) {
      frexpf(most, &exponent);
    }
    float const factor = ldexpf(1.f, -max_int(-120, min_int(120, exponent)));
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      int const d = i * 32 + lane;
      int const place = chunk_place<kDim>(row, d / 8) + d % 8;
      leading[place] = Element(x[i] * factor);
      rest[place] = Element(x[i] * factor - static_cast<float>(leading[place]));
    }
    if (lane == 0) {
      int64_t const list = int64_t{batch} * p.heads_q + head;
      least[row] = there ? p.least[list * p.grid.blocks() + first_block + block] * factor
                         : NAN;  // no score reaches it
    }
  }
}

template <class Element, int kDim>
__global__ void __launch_bounds__(kMmaThreads, kDim == 256 ? 2 : 3)
    anchor_keys_kernel(AnchorKeys const p) {
  constexpr int kTileKeys = kKeys<kDim>;
  constexpr int kWords = kTileKeys / 32;
  static_assert(kRows <= kTileKeys, "a set of rows has room in a tile of keys");
  extern __shared__ uint4 shared[];
  __shared__ uint32_t seen[2][kRows][kWords];
  __shared__ float row_least[kRows];
  auto* const tiles = reinterpret_cast<Element*>(shared);  // [2][kTileKeys][kDim]
  AnchorGrid const grid = p.grid;
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;

  // All superblocks with the same range of keys are adjacent, so that they find it in the L2 cache.
  int32_t const group = p.heads_q / p.heads_kv;
  int32_t const heads_at_once = heads_of_part(grid, group);
  int32_t const parts = ceil_div(group, heads_at_once);
  int32_t const superblocks = grid.superblocks();
  int32_t const runs = ceil_div(grid.candidates(superblocks - 1), kRunKeys);
  int32_t item = blockIdx.x;
  int32_t const part = item % parts;
  item /= parts;
  int32_t const superblock = item % superblocks;
  item /= superblocks;
  int32_t const first_candidate = item % runs * kRunKeys;
  item /= runs;
  int32_t const head_kv = item % p.heads_kv;
  int32_t const batch = item / p.heads_kv;
  int32_t const end = min_int(grid.candidates(superblock), first_candidate + kRunKeys);
  if (first_candidate >= end) {
    return;
  }
  int32_t const first_head = head_kv * group + part * heads_at_once;
  int32_t const heads = min_int(heads_at_once, group - part * heads_at_once);
  int32_t const first_block = superblock * grid.step;
  int32_t const blocks = min_int(grid.step, grid.blocks() - first_block);

  split_means<kDim>(p, batch, first_head, heads, first_block, blocks, tiles, tiles + kRows * kDim,
                    row_least);
  __syncthreads();
  // Warps without rows of their own share those of the others and take different keys.
  int const num_rows = heads * grid.step;
  int const log2_sharers = num_rows <= 16 ? 2 : num_rows <= 32 ? 1 : 0;
  int const first_word = warp % (1 << log2_sharers);
  int const warp_row = (warp >> log2_sharers) * kWarpRows;
  MmaRows<kDim> rows[2];
  rows[0].load(tiles, warp_row);
  rows[1].load(tiles + kRows * kDim, warp_row);
  float const least[2] = {row_least[warp_row + lane / 4], row_least[warp_row + lane / 4 + 8]};
  __syncthreads();

  auto const* const keys =
      static_cast<Element const*>(p.k.data) + batch * p.k.batch_stride + head_kv * p.k.head_stride;
  int32_t const num_tiles = ceil_div(end - first_candidate, kTileKeys);
  int64_t const k_stride = p.k.axis_stride[kGridAxes - 1];
  auto copy_tile = [&](int32_t t) {
    int32_t const first = grid.block + first_candidate + t * kTileKeys;
    copy_rows<kDim, kTileKeys>(tiles + t % 2 * kTileKeys * kDim, keys + first * k_stride, k_stride,
                               grid.length - first, p.head_dim);
    cutlass::arch::cp_async_fence();
  };
  // A head keeps what any of its blocks keeps.
  auto store = [&](int32_t t) {
    for (int i = threadIdx.x; i < heads * kWords; i += kMmaThreads) {
      int const head = i / kWords;
      int const word = i % kWords;
      int32_t const candidate = first_candidate + t * kTileKeys + word * 32;
      if (candidate < end) {
        uint32_t kept = 0;
        for (int block = 0; block < blocks; ++block) {
          kept |= seen[t % 2][head * grid.step + block][word];
        }
        int64_t const list =
            (int64_t{batch} * p.heads_q + first_head + head) * superblocks + superblock;
        p.bits[list * grid.words() + candidate / 32] = kept;
      }
    }
  };
  copy_tile(0);
  for (int32_t t = 0; t < num_tiles; ++t) {
    cutlass::arch::cp_async_wait<0>();
    // Tile t has landed, the tile before it has been read by all, and its results are visible.
    __syncthreads();
    if (t + 1 < num_tiles) {
      copy_tile(t + 1);
    }
    if (t > 0) {
      store(t - 1);
    }
    for (int word = first_word; word < kWords; word += 1 << log2_sharers) {
      MmaScores scores;
      multiply(rows, tiles + t % 2 * kTileKeys * kDim, word * 32, scores);
      uint32_t kept[2] = {0, 0};  // of rows g and g + 8; key 8n + 2t + i is at bit 8n + i so far
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          bool const keep = scores[0][n][r] + scores[1][n][r] >= least[r / 2];
          kept[r / 2] |= keep ? 1u << (8 * n + r % 2) : 0u;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t bits = kept[half] << lane % 4 * 2;
        bits |= __shfl_xor_sync(kWholeWarp, bits, 1);
        bits |= __shfl_xor_sync(kWholeWarp, bits, 2);
        if (lane % 4 == 0) {
          seen[t % 2][warp_row + 8 * half + lane / 4][word] = bits;
        }
      }
    }
  }
  __syncthreads();
  store(num_tiles - 1);
}

// One warp per superblock of a head.
__global__ void __launch_bounds__(kMmaThreads)
    count_bits(uint32_t const* bits, int64_t lists, int32_t words, int32_t* counts) {
  int64_t const list = int64_t{blockIdx.x} * kMmaWarps + threadIdx.x / 32;
  if (list >= lists) {
    return;
  }
  int32_t count = 0;
  for (int32_t word = threadIdx.x % 32; word < words; word += 32) {
    count += __popc(bits[list * words + word]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(kWholeWarp, count, step);
  }
  if (threadIdx.x % 32 == 0) {
    counts[list] = count;
  }
}

}  // namespace

void anchor_keys(AnchorKeys const& p, ExecutionContext const& context) {
  auto const stream = static_cast<cudaStream_t>(context.stream);
  int32_t const superblocks = p.grid.superblocks();
  int32_t const words = p.grid.words();
  int64_t const lists = int64_t{p.batch} * p.heads_q * superblocks;
  if (words > 0) {
    check_cuda(cudaMemsetAsync(p.bits, 0, lists * words * sizeof(uint32_t), stream),
               "clearing the bits of keys");
    int32_t const group = p.heads_q / p.heads_kv;
    int64_t const parts = ceil_div(group, heads_of_part(p.grid, group));
    int64_t const runs = ceil_div(words * 32, kRunKeys);
    int64_t const blocks = parts * superblocks * runs * p.heads_kv * p.batch;
    with_mma_types(p.dtype, p.head_dim, [&](auto element, auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch_mma(&anchor_keys_kernel<decltype(element), kDim>, p, blocks, kSmemBytes<kDim>, context,
                 "the search for distant keys");
    });
  }
  count_bits<<<grid_size((lists + kMmaWarps - 1) / kMmaWarps, "the counting of keys"), kMmaThreads,
               0, stream>>>(p.bits, lists, words, p.counts);
  check_cuda(cudaGetLastError(), "launching the counting of keys");
}

}  // namespace sparse_fmha::device
