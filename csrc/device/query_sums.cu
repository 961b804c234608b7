#include "sparse_fmha/device/query_sums.h"

#include "sparse_fmha/device/box_mask.h"
#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;           // of a thread; head dims are multiples of it
constexpr int kQuads = kSumRows / 2;  // four neighboring lanes hold two rows
constexpr int kGroup = kQuads * 4;    // numbers of four that hold the columns of a thread

struct Params {
  float4 const* sums;
  void* to;  // [B, grid, H, D]
  SumTiles tiles;
  BoxBits bits;  // of tiles.box
  int32_t heads;
  int32_t groups;  // of columns: D / 8
  float scale;
};

// The numbers of four neighboring lanes in eight columns of sums, [lane][number].
template <SumOrder kOrder>
struct QuadNumbers {
  float of[4][4];
  __device__ __forceinline__ QuadNumbers(float4 const* sums, int quad) {
    constexpr bool kByThread = kOrder == SumOrder::kThreads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a lane, or a number
      int const place = kByThread ? quad * 4 + i : quad / 8 * 32 + i * 8 + quad % 8;
      float4 const x = sums[place];
      float const four[] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        (kByThread ? of[i][j] : of[j][i]) = four[j];
      }
    }
  }
};

// A thread block has a tile. A thread has eight columns of two rows, which are the numbers of four
// neighboring lanes. Neighboring threads have neighboring columns.
template <class Element, SumOrder kOrder>
__global__ void __launch_bounds__(kThreads) round_sums(Params const p) {
  SumTiles const& tiles = p.tiles;
  int32_t tile = blockIdx.x;
  Coord origin;   // token of the tile's first row
  Coord between;  // tokens from one to the next
#pragma unroll
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    int32_t const boxes = tiles.boxes[axis];
    int32_t const all = boxes * tiles.dilation[axis];
    int32_t const place = tile % all;
    tile /= all;
    between[axis] = tiles.step[axis] * tiles.dilation[axis];
    origin[axis] = tiles.first[axis] + tiles.step[axis] * (place / boxes) +
                   between[axis] * (place % boxes * tiles.box[axis]);
  }
  int32_t const batch = tile / p.heads;
  int32_t const head = tile % p.heads;
  float4 const* const sums = p.sums + int64_t{blockIdx.x} * p.groups * kGroup;
  for (int item = threadIdx.x; item < kQuads * p.groups; item += kThreads) {
    int const group = item % p.groups;
    int const quad = item / p.groups;
    QuadNumbers<kOrder> const numbers(sums + group * kGroup, quad);
    uint4 rows[kRowsPerThread];
    auto* const first = reinterpret_cast<Element*>(&rows[0]);
    auto* const second = reinterpret_cast<Element*>(&rows[1]);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      float const(&x)[4] = numbers.of[lane];
      first[2 * lane] = Element(x[0] * p.scale);
      first[2 * lane + 1] = Element(x[1] * p.scale);
      second[2 * lane] = Element(x[2] * p.scale);
      second[2 * lane + 1] = Element(x[3] * p.scale);
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      Coord const offset = p.bits.offset(quad / 8 * 16 + quad % 8 + 8 * i);
      int64_t at = batch;
      bool inside = true;
#pragma unroll
      for (int axis = 0; axis < kGridAxes; ++axis) {
        int32_t const token = origin[axis] + between[axis] * offset[axis];
        inside &= token < tiles.grid[axis];
        at = at * tiles.grid[axis] + token;
      }
      if (inside) {
        static_cast<uint4*>(p.to)[(at * p.heads + head) * p.groups + group] = rows[i];
      }
    }
  }
}

int64_t all_tiles(FmhaProblem const& p, SumTiles const& tiles) {
  return int64_t{tiles.count()} * p.batch * p.heads_q;
}

}  // namespace

float* new_query_sums(FmhaProblem const& p, SumTiles const& tiles,
                      ExecutionContext const& context) {
  size_t const bytes =
      static_cast<size_t>(all_tiles(p, tiles)) * kSumRows * p.head_dim * sizeof(float);
  void* const sums = context.memory->allocate(bytes);
  check_cuda(cudaMemsetAsync(sums, 0, bytes, static_cast<cudaStream_t>(context.stream)),
             "clearing the sums of dQ");
  return static_cast<float*>(sums);
}

void round_query_sums(FmhaProblem const& p, SumTiles const& tiles, float const* sums,
                      SumOrder order, ExecutionContext const& context) {
  Params const params = {reinterpret_cast<float4 const*>(sums),
                         p.gradients->q.data,
                         tiles,
                         {log2_floor(tiles.box[1]), log2_floor(tiles.box[2])},
                         p.heads_q,
                         p.head_dim / kColumns,
                         static_cast<float>(p.scale)};
  unsigned const blocks = grid_size(all_tiles(p, tiles), "the rows of dQ");
  auto const launch = [&](auto* const by_threads, auto* const by_numbers) {
    auto* const kernel = order == SumOrder::kThreads ? by_threads : by_numbers;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(params);
  };
  if (p.dtype == DataType::kFloat16) {
    using Element = cutlass::half_t;
    launch(&round_sums<Element, SumOrder::kThreads>, &round_sums<Element, SumOrder::kNumbers>);
  } else {
    using Element = cutlass::bfloat16_t;
    launch(&round_sums<Element, SumOrder::kThreads>, &round_sums<Element, SumOrder::kNumbers>);
  }
  check_cuda(cudaGetLastError(), "launching the kernel that rounds dQ");
}

}  // namespace sparse_fmha::device
