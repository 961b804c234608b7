#include "sparse_fmha/device/packed_plan.h"

#include <cub/block/block_scan.cuh>
#include <limits>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/allocate.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 512;
constexpr int kWeights = 256;

// What is known of the sequences. Segments are the tokens before the first sequence, the sequences,
// and the tokens after the last one.
struct Segments {
  int32_t* q_start;       // [sequences + 1]
  int32_t* k_start;       // [sequences + 1]
  int32_t* k_len;         // [sequences], positions in use
  int32_t* first_tile;    // [segments + 1]
  int32_t* place;         // [segments], of a segment's first tile in the order of tiles
  int32_t* pages_before;  // [sequences, page_stride]; nullptr: keys are not in pages
  int32_t page_stride;
};

struct Sizes {
  int32_t tokens_q;
  int32_t tokens_k;
  int32_t tile_q;
  bool causal;
};

__device__ __forceinline__ int32_t segments_of(PackedTokens const& packed) {
  return packed.sequences + 2;
}
__device__ __forceinline__ int32_t segment_begin(Segments const& s, int32_t segment) {
  return segment == 0 ? 0 : s.q_start[segment - 1];
}
__device__ __forceinline__ int32_t segment_end(PackedTokens const& packed, Segments const& s,
                                               Sizes const& sizes, int32_t segment) {
  return segment <= packed.sequences ? s.q_start[segment] : sizes.tokens_q;
}

struct Larger {
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const { return max(a, b); }
};
struct Sum {
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const { return a + b; }
};

// Run by one thread block: to(i, result) for each i in [0, count), where the result combines
// value(0) to value(i) and `before`.
template <class Combine, class Value, class To>
__device__ __forceinline__ void scan(int32_t count, int32_t before, Value const& value,
                                     To const& to) {
  using Scan = cub::BlockScan<int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage memory;
  for (int32_t first = 0; first < count; first += kThreads) {
    int32_t const i = first + static_cast<int32_t>(threadIdx.x);
    int32_t const mine = i < count ? value(i) : 0;
    int32_t result = 0;
    int32_t all = 0;
    Scan(memory).InclusiveScan(mine, result, Combine{}, all);
    if (i < count) {
      to(i, Combine{}(before, result));
    }
    before = Combine{}(before, all);
    __syncthreads();
  }
}

// Run by one thread block.
__device__ __forceinline__ void find(PackedTokens const& packed, Segments const& segments,
                                     Sizes const& sizes) {
  int32_t const starts = packed.sequences + 1;
  auto const within = [](int32_t start, int32_t tokens) { return min(max(start, 0), tokens); };
  scan<Larger>(
      starts, 0, [&](int32_t i) { return within(packed.cu_q[i], sizes.tokens_q); },
      [&](int32_t i, int32_t start) { segments.q_start[i] = start; });
  if (packed.cu_k != nullptr) {
    scan<Larger>(
        starts, 0, [&](int32_t i) { return within(packed.cu_k[i], sizes.tokens_k); },
        [&](int32_t i, int32_t start) { segments.k_start[i] = start; });
  }
  __syncthreads();
  PageTable const& table = packed.table;
  int32_t const capacity = table.width * table.page_size;  // checked to fit
  for (int32_t b = static_cast<int32_t>(threadIdx.x); b < packed.sequences; b += kThreads) {
    bool const paged = table.entries != nullptr;
    int32_t const held = packed.cu_k != nullptr ? segments.k_start[b + 1] - segments.k_start[b]
                                                : std::numeric_limits<int32_t>::max();
    int32_t const used = packed.used_k != nullptr ? max(packed.used_k[b], 0) : held;
    segments.k_len[b] = paged ? min(used, capacity) : min(held, used);
  }
  scan<Sum>(
      segments_of(packed), 0,
      [&](int32_t i) {
        return ceil_div(segment_end(packed, segments, sizes, i) - segment_begin(segments, i),
                        sizes.tile_q);
      },
      [&](int32_t i, int32_t tiles) { segments.first_tile[i + 1] = tiles; });
  if (threadIdx.x == 0) {
    segments.first_tile[0] = 0;
  }
}

// The number of keys before a position of a sequence.
__device__ __forceinline__ KeysBefore keys_before(PackedTokens const& packed,
                                                  Segments const& segments, int32_t sequence) {
  return {segments.pages_before == nullptr
              ? nullptr
              : segments.pages_before + int64_t{sequence} * segments.page_stride,
          packed.table.page_size};
}

// The last row of a segment sees the most keys.
__device__ __forceinline__ int32_t most_keys(PackedTokens const& packed, Segments const& segments,
                                             Sizes const& sizes, int32_t segment) {
  int32_t const sequence = segment - 1;
  if (sequence < 0 || sequence >= packed.sequences) {
    return 0;
  }
  int32_t const rows = segments.q_start[segment] - segments.q_start[sequence];
  PackedParams const params = PackedSequences::of(sizes.causal, rows, segments.k_len[sequence],
                                                  keys_before(packed, segments, sequence));
  return rows > 0 ? PackedSequences::limit(params, rows - 1) : 0;
}

__device__ __forceinline__ PackedTile describe(PackedTokens const& packed, Segments const& segments,
                                               Sizes const& sizes, int32_t segment, int32_t row) {
  int32_t const begin = segment_begin(segments, segment);
  PackedTile result = {row, begin, segment_end(packed, segments, sizes, segment) - begin, 0, 0, 0,
                       0,   0};
  int32_t const sequence = segment - 1;
  if (sequence >= 0 && sequence < packed.sequences) {
    bool const paged = packed.table.entries != nullptr;
    result.k_begin =
        paged ? sequence * packed.table.width * packed.table.page_size : segments.k_start[sequence];
    result.k_len = segments.k_len[sequence];
    result.k_rows = keys_before(packed, segments, sequence)(result.k_len);
    result.sequence = sequence;
  }
  return result;
}

// Run by one thread block. The tiles of a sequence follow each other, so that those at work share
// keys. Within a sequence later rows see more keys, and sequences are in the order of what their
// last rows see, to one part in kWeights. The order of sequences of equal weight varies.
__device__ __forceinline__ void order(PackedTokens const& packed, Segments const& segments,
                                      Sizes const& sizes, PackedTile* tiles) {
  __shared__ int32_t places[kWeights];  // tiles of each weight, then the first place of the next
  __shared__ int32_t heaviest;
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  int32_t const count = segments_of(packed);
  if (thread < kWeights) {
    places[thread] = 0;
  }
  heaviest = 1;
  __syncthreads();
  auto tiles_of = [&](int32_t segment) {
    return segments.first_tile[segment + 1] - segments.first_tile[segment];
  };
  for (int32_t i = thread; i < count; i += kThreads) {
    segments.place[i] = most_keys(packed, segments, sizes, i);
    atomicMax(&heaviest, segments.place[i]);
  }
  __syncthreads();
  auto weight_of = [&](int32_t keys) {
    return static_cast<int32_t>(int64_t{keys} * (kWeights - 1) / heaviest);
  };
  for (int32_t i = thread; i < count; i += kThreads) {
    atomicAdd(&places[weight_of(segments.place[i])], tiles_of(i));
  }
  __syncthreads();
  int32_t const mine = thread < kWeights ? places[thread] : 0;
  scan<Sum>(
      kWeights, 0, [&](int32_t i) { return places[i]; },
      [&](int32_t i, int32_t end) { places[i] = end - mine; });
  for (int32_t i = thread; i < count; i += kThreads) {
    segments.place[i] = atomicAdd(&places[weight_of(segments.place[i])], tiles_of(i));
  }
  __syncthreads();
  for (int32_t tile = thread; tile < segments.first_tile[count]; tile += kThreads) {
    int32_t low = 0;  // the segment that has the tile
    int32_t high = count - 1;
    while (low < high) {
      int32_t const middle = (low + high + 1) / 2;
      if (segments.first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    int32_t const in_segment = tile - segments.first_tile[low];
    tiles[segments.place[low] + in_segment] =
        describe(packed, segments, sizes, low, in_segment * sizes.tile_q);
  }
}

__global__ void __launch_bounds__(kThreads)
    find_segments(PackedTokens packed, Segments segments, Sizes sizes) {
  find(packed, segments, sizes);
}
__global__ void __launch_bounds__(kThreads)
    order_tiles(PackedTokens packed, Segments segments, Sizes sizes, PackedTile* tiles) {
  order(packed, segments, sizes, tiles);
}
// Both, where there are no pages to count in between.
__global__ void __launch_bounds__(kThreads)
    find_and_order_tiles(PackedTokens packed, Segments segments, Sizes sizes, PackedTile* tiles) {
  find(packed, segments, sizes);
  __syncthreads();
  order(packed, segments, sizes, tiles);
}

}  // namespace

PackedPlan plan_packed(FmhaProblem const& p, int32_t tile_q, ExecutionContext const& context,
                       PackedKeys& keys) {
  PackedTokens const& packed = *p.packed;
  int64_t const tokens_q = volume(p.grid_q);
  int64_t const tokens_k = volume(p.grid_kv);
  int64_t const most = tokens_q / tile_q + packed.sequences + 2;
  auto const stream = static_cast<cudaStream_t>(context.stream);
  bool const paged = packed.table.entries != nullptr;
  int64_t const sequences = packed.sequences;

  Segments segments;
  segments.page_stride = paged ? packed.table.width + 2 : 0;
  segments.q_start =
      allocate<int32_t>(context, 5 * sequences + 7 + sequences * segments.page_stride);
  segments.k_start = segments.q_start + sequences + 1;
  segments.k_len = segments.k_start + sequences + 1;
  segments.first_tile = segments.k_len + sequences;
  segments.place = segments.first_tile + sequences + 3;
  segments.pages_before = paged ? segments.place + sequences + 2 : nullptr;
  auto* const tiles = allocate<PackedTile>(context, most);
  Sizes const sizes = {static_cast<int32_t>(tokens_q),
                       paged ? std::numeric_limits<int32_t>::max() : static_cast<int32_t>(tokens_k),
                       tile_q, std::holds_alternative<Causal::Params>(p.sparsity)};

  keys = {p.k, p.v};
  if (paged && sequences > 0) {
    find_segments<<<1, kThreads, 0, stream>>>(packed, segments, sizes);
    check_cuda(cudaGetLastError(), "launching the search for sequences");
    PagedSequences const paged_keys = {segments.k_len, segments.pages_before, segments.page_stride};
    count_pages(packed, paged_keys, context);
    keys = copy_pages(p, paged_keys, context);
    order_tiles<<<1, kThreads, 0, stream>>>(packed, segments, sizes, tiles);
    check_cuda(cudaGetLastError(), "launching the ordering of query tiles");
  } else {
    find_and_order_tiles<<<1, kThreads, 0, stream>>>(packed, segments, sizes, tiles);
    check_cuda(cudaGetLastError(), "launching the search for query tiles");
  }
  return {tiles, segments.first_tile + sequences + 2, static_cast<int32_t>(most),
          segments.pages_before, segments.page_stride};
}

}  // namespace sparse_fmha::device
