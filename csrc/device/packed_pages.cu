#include "sparse_fmha/device/packed_pages.h"

#include <algorithm>
#include <limits>

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha::device {
namespace {

__device__ __forceinline__ bool exists(PageTable const& table, int32_t sequence, int32_t i) {
  int32_t const page = i < table.width ? table.entries[sequence * table.row_stride + i] : -1;
  return page >= 0 && page < table.pages;
}

// A warp for each sequence.
__global__ void count_pages_of(PackedTokens packed, PagedSequences paged) {
  int32_t const lane = static_cast<int32_t>(threadIdx.x);
  auto const sequence = static_cast<int32_t>(blockIdx.x);
  int32_t const used = ceil_div(paged.k_len[sequence], packed.table.page_size);
  int64_t const row = int64_t{sequence} * paged.page_stride;
  int32_t before = 0;
  for (int32_t first = 0; first < paged.page_stride; first += 32) {
    int32_t const i = first + lane;
    bool const mine = i < used && exists(packed.table, sequence, i);
    uint32_t const here = __ballot_sync(0xffffffff, mine);
    if (i < paged.page_stride) {
      paged.pages_before[row + i] = before + __popc(here & ((1u << lane) - 1));
    }
    before += __popc(here);
  }
}

// 16 bytes of a row.
using Vector = uint4;
constexpr int kCopyThreads = 256;
constexpr int32_t kCopyRows = 32;   // of a thread block
constexpr int kCopiesInFlight = 4;  // vectors that a thread has loaded before it stores them
struct PageCopies {
  Vector const* from[2];   // k and v
  int64_t page_stride[2];  // in vectors
  int64_t row_stride[2];
  int64_t head_stride[2];
  Vector* to[2];  // [sequences, width * page_size, heads, vectors]
  int32_t heads;
  int32_t vectors;  // of a row of one head
};

// A thread block copies kCopyRows positions of a sequence, of k or v. Threads are [y, x] over rows
// and the vectors of a row.
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows(PackedTokens const __grid_constant__ packed, PagedSequences paged,
              PageCopies const __grid_constant__ copies) {
  __shared__ int64_t from_rows[kCopyRows];  // in vectors; kNone: no such key
  __shared__ int64_t to_rows[kCopyRows];
  constexpr int64_t kNone = std::numeric_limits<int64_t>::min();
  uint32_t const of_sequence = gridDim.x / packed.sequences;
  auto const sequence = static_cast<int32_t>(blockIdx.x / of_sequence);
  auto const which = static_cast<int32_t>(blockIdx.y);
  int32_t const begin = static_cast<int32_t>(blockIdx.x % of_sequence) * kCopyRows;
  int32_t const rows = min(paged.k_len[sequence] - begin, kCopyRows);
  if (rows <= 0) {
    return;
  }
  int32_t const size = packed.table.page_size;
  int32_t const of_row = copies.heads * copies.vectors;
  auto const x = static_cast<int32_t>(threadIdx.x);
  auto const y = static_cast<int32_t>(threadIdx.y);
  auto const across = static_cast<int32_t>(blockDim.x);
  auto const down = static_cast<int32_t>(blockDim.y);
  for (int32_t row = y * across + x; row < rows; row += across * down) {
    int32_t const page = (begin + row) / size;
    int32_t const of_page = (begin + row) % size;
    from_rows[row] = kNone;
    if (exists(packed.table, sequence, page)) {
      int32_t const entry = packed.table.entries[sequence * packed.table.row_stride + page];
      int64_t const before = paged.pages_before[int64_t{sequence} * paged.page_stride + page];
      from_rows[row] = entry * copies.page_stride[which] + of_page * copies.row_stride[which];
      to_rows[row] = (int64_t{sequence} * packed.table.width + before) * size * of_row +
                     int64_t{of_page} * of_row;
    }
  }
  __syncthreads();
  for (int32_t column = x; column < of_row; column += across) {
    Vector const* const from = copies.from[which] +
                               column / copies.vectors * copies.head_stride[which] +
                               column % copies.vectors;
    Vector* const to = copies.to[which] + column;
    for (int32_t first = y; first < rows; first += kCopiesInFlight * down) {
      bool there[kCopiesInFlight];
      Vector held[kCopiesInFlight];
#pragma unroll
      for (int i = 0; i < kCopiesInFlight; ++i) {
        int32_t const row = first + i * down;
        there[i] = row < rows && from_rows[row] != kNone;
        if (there[i]) {
          held[i] = from[from_rows[row]];
        }
      }
#pragma unroll
      for (int i = 0; i < kCopiesInFlight; ++i) {
        if (there[i]) {
          to[to_rows[first + i * down]] = held[i];
        }
      }
    }
  }
}

}  // namespace

void count_pages(PackedTokens const& packed, PagedSequences const& paged,
                 ExecutionContext const& context) {
  count_pages_of<<<static_cast<unsigned>(packed.sequences), 32, 0,
                   static_cast<cudaStream_t>(context.stream)>>>(packed, paged);
  check_cuda(cudaGetLastError(), "launching the counting of pages");
}

PackedKeys copy_pages(FmhaProblem const& p, PagedSequences const& paged,
                      ExecutionContext const& context) {
  constexpr int kElements = sizeof(Vector) / 2;
  PageTable const& table = p.packed->table;
  int64_t const tokens = int64_t{p.packed->sequences} * table.width * table.page_size;
  int64_t const row = int64_t{p.heads_kv} * p.head_dim;
  PageCopies copies;
  copies.heads = p.heads_kv;
  copies.vectors = p.head_dim / kElements;
  TensorView const from[2] = {p.k, p.v};
  TensorView to[2];
  for (int i = 0; i < 2; ++i) {
    copies.from[i] = static_cast<Vector const*>(from[i].data);
    copies.page_stride[i] = from[i].batch_stride / kElements;
    copies.row_stride[i] = from[i].axis_stride[kGridAxes - 1] / kElements;
    copies.head_stride[i] = from[i].head_stride / kElements;
    copies.to[i] = static_cast<Vector*>(
        context.memory->allocate(static_cast<size_t>(tokens * row / kElements) * sizeof(Vector)));
    to[i] = {copies.to[i], 0, {0, 0, row}, p.head_dim};
  }
  if (tokens > 0) {
    int32_t const positions = table.width * table.page_size;
    dim3 const blocks(static_cast<unsigned>(ceil_div(positions, kCopyRows) * p.packed->sequences),
                      2);
    auto const across =
        static_cast<unsigned>(std::min(copies.heads * copies.vectors, kCopyThreads));
    dim3 const threads(across, kCopyThreads / across);
    copy_rows<<<blocks, threads, 0, static_cast<cudaStream_t>(context.stream)>>>(*p.packed, paged,
                                                                                 copies);
    check_cuda(cudaGetLastError(), "launching the copies of pages");
  }
  return {to[0], to[1]};
}

}  // namespace sparse_fmha::device
