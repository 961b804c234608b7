// The mean over each query block of the largest score with an anchor key.
#include "sparse_fmha/device/anchor_kernels.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kKeys = AnchorGrid::kTile;
constexpr int kRows =
    128;  // of a thread block; the queries of a block of all heads that share keys
constexpr int kWarpRows = 32;

template <int kDim>
constexpr size_t kSmemBytes = 2 * kKeys * kDim * sizeof(uint16_t);
static_assert(kRows == 2 * kKeys, "the rows lie where both tiles of keys do later");

// NaN if either is NaN: a row with NaN scores has no anchor.
__device__ __forceinline__ float larger(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

template <class Element>
__device__ __forceinline__ Element const* row_of(TensorView const& t, int32_t batch, int32_t token,
                                                 int32_t head) {
  return static_cast<Element const*>(t.data) + batch * t.batch_stride +
         token * t.axis_stride[kGridAxes - 1] + head * t.head_stride;
}

// Removes the scores with keys after the query. The first key is `ahead` tokens after the first
// query.
__device__ __forceinline__ void mask_later(MmaScores& scores, int32_t ahead) {
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int set = 0; set < 2; ++set) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        int32_t const key = ahead + 8 * n + lane % 4 * 2 + r % 2;
        int32_t const query = 16 * set + r / 2 * 8 + lane / 4;
        scores[set][n][r] = key > query ? -INFINITY : scores[set][n][r];
      }
    }
  }
}

template <class Element, int kDim>
__global__ void __launch_bounds__(kMmaThreads, kDim == 256 ? 2 : 3)
    anchor_means_kernel(AnchorMeans const p) {
  extern __shared__ uint4 shared[];
  __shared__ float tops[2][kRows];
  auto* const tiles = reinterpret_cast<Element*>(shared);  // [2][kKeys][kDim]
  AnchorGrid const grid = p.grid;
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;

  // The rows of the heads that share keys, one head after another, in parts of kRows.
  int32_t const group = p.heads_q / p.heads_kv;
  int32_t const parts = ceil_div(group * grid.block, kRows);
  int32_t item = blockIdx.x;
  int32_t const first_row = item % parts * kRows;
  item /= parts;
  int32_t const block = grid.blocks() - 1 - item % grid.blocks();
  item /= grid.blocks();
  int32_t const head_kv = item % p.heads_kv;
  int32_t const batch = item / p.heads_kv;
  int32_t const first_head = head_kv * group + first_row / grid.block;
  int32_t const rows_here = min_int(kRows, group * grid.block - first_row);
  int32_t const first_token = block * grid.block;

  // 64 rows belong to one head.
  int64_t const q_stride = p.q.axis_stride[kGridAxes - 1];
  for (int half = 0; half < kRows; half += kRows / 2) {
    int32_t const token = first_token + half % grid.block;
    int32_t const there = half < rows_here ? grid.length - token : 0;
    copy_rows<kDim, kRows / 2>(
        tiles + half * kDim,
        there > 0 ? row_of<Element>(p.q, batch, token, first_head + half / grid.block)
                  : static_cast<Element const*>(p.q.data),
        q_stride, there, p.head_dim);
  }
  cutlass::arch::cp_async_fence();
  cutlass::arch::cp_async_wait<0>();
  __syncthreads();
  // If there are only 64 rows, two warps share them and take alternate keys.
  bool const shares_rows = rows_here < kRows;
  int const warp_row = (shares_rows ? warp % 2 : warp) * kWarpRows;
  int const part = shares_rows ? warp / 2 : 0;
  int const chunk_step = shares_rows ? 64 : 32;
  MmaRows<kDim> rows[2];
  for (int set = 0; set < 2; ++set) {
    rows[set].load(tiles, warp_row + 16 * set);
    if (p.scale < 0) {
      rows[set].negate();
    }
  }
  __syncthreads();

  auto const* const keys = row_of<Element>(p.k, batch, 0, head_kv);
  int64_t const k_stride = p.k.axis_stride[kGridAxes - 1];
  auto copy_tile = [&](int32_t t) {
    int32_t const first = grid.anchor_tile(block, t);  // a last block may end before its last tile
    copy_rows<kDim, kKeys>(tiles + t % 2 * kKeys * kDim,
                           keys + min_int(first, grid.length - 1) * k_stride, k_stride,
                           grid.length - first, p.head_dim);
    cutlass::arch::cp_async_fence();
  };
  float top[2][2];  // of rows g and g + 8 of each set
  for (int set = 0; set < 2; ++set) {
    top[set][0] = top[set][1] = -INFINITY;
  }
  int32_t const warp_token = first_token + warp_row % grid.block;
  int32_t const num_tiles = grid.anchor_tiles(block);
  copy_tile(0);
  for (int32_t t = 0; t < num_tiles; ++t) {
    cutlass::arch::cp_async_wait<0>();
    __syncthreads();  // tile t has landed, and the tile before it has been read by all
    if (t + 1 < num_tiles) {
      copy_tile(t + 1);
    }
    for (int chunk = part * 32; chunk < kKeys; chunk += chunk_step) {
      int32_t const first_key = grid.anchor_tile(block, t) + chunk;
      if (first_key >= warp_token + kWarpRows) {
        continue;  // after all queries of the warp
      }
      MmaScores scores;
      multiply(rows, tiles + t % 2 * kKeys * kDim, chunk, scores);
      if (first_key + 31 > warp_token) {
        mask_later(scores, first_key - warp_token);
      }
#pragma unroll
      for (int set = 0; set < 2; ++set) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            top[set][r / 2] = larger(top[set][r / 2], scores[set][n][r]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int set = 0; set < 2; ++set) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[set][half];
      most = larger(most, __shfl_xor_sync(kWholeWarp, most, 1));
      most = larger(most, __shfl_xor_sync(kWholeWarp, most, 2));
      if (lane % 4 == 0) {
        tops[part][warp_row + 16 * set + 8 * half + lane / 4] = most;
      }
    }
  }
  __syncthreads();

  // One warp per head.
  if (warp < rows_here / grid.block) {
    int32_t const num_tokens = min_int(grid.block, grid.length - first_token);
    float sum = 0;
    for (int row = lane; row < num_tokens; row += 32) {
      float const one = tops[0][warp * grid.block + row];
      sum += shares_rows ? larger(one, tops[1][warp * grid.block + row]) : one;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, step);
    }
    if (lane == 0) {
      int64_t const heads = int64_t{batch} * p.heads_q + first_head + warp;
      p.means[heads * grid.blocks() + block] = sum * fabsf(p.scale) / num_tokens;
    }
  }
}

}  // namespace

void anchor_means(AnchorMeans const& p, ExecutionContext const& context) {
  int64_t const parts = ceil_div(p.heads_q / p.heads_kv * p.grid.block, kRows);
  int64_t const blocks = parts * p.grid.blocks() * p.heads_kv * p.batch;
  with_mma_types(p.dtype, p.head_dim, [&](auto element, auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch_mma(&anchor_means_kernel<decltype(element), kDim>, p, blocks, kSmemBytes<kDim>, context,
               "the search for anchors");
  });
}

}  // namespace sparse_fmha::device
