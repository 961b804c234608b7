// The merge of attention over parts of the keys: each element is read once and written once.
#include "sparse_fmha/device/merge_parts.h"

#include <algorithm>

#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kThreads = 128;
constexpr int kBytes = 16;  // that a thread reads at once, where addresses allow it
constexpr int kPieces = 4;  // of a thread
constexpr int kBlocks = 5;  // of a multiprocessor, at least: 40 KB are on their way

// kWidth consecutive elements.
template <class Element, int kWidth>
struct alignas(kWidth * sizeof(Element)) Elements {
  Element x[kWidth];
};

// `lanes` threads have a row. A thread reads all parts of its elements before it writes them: the
// result may be where the first part is. Several pieces of a thread share its row's weights, and
// are on their way together.
template <class Element, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    merge_parts_kernel(MergeProblem const __grid_constant__ p, uint32_t rows, int lanes) {
  using Some = Elements<Element, kWidth>;
  int const lane = threadIdx.x % lanes;
  int const rows_here = kThreads / lanes;
  uint64_t const index = uint64_t{blockIdx.x} * rows_here + threadIdx.x / lanes;
  if (index >= rows || threadIdx.x >= rows_here * lanes) {
    return;
  }
  auto const row = static_cast<uint32_t>(index);
  MergeRow const at(p, row);
  auto const lse_of = [&](int32_t i) { return p.parts[i].lse[at.offset(p.parts[i].lse_stride)]; };
  float const lse = merged_lse<float>(p.count, lse_of);
  if (lane == 0) {
    p.lse[row] = lse;
  }
  auto* const to = static_cast<Element*>(p.out) + at.offset(p.out_stride);
  for (int32_t first = lane * kWidth; first < p.head_dim; first += lanes * kWidth * kPieces) {
    auto const for_each_piece = [&](auto const& body) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        int32_t const column = first + k * lanes * kWidth;
        if (column < p.head_dim) {
          body(k, column);
        }
      }
    };
    float sum[kPieces][kWidth] = {};
    for (int32_t i = 0; i < p.count; ++i) {
      float const weight = merge_weight(lse, lse_of(i));
      if (weight == 0.f) {
        continue;  // a part without keys may hold NaN
      }
      auto const* const from =
          static_cast<Element const*>(p.parts[i].out) + at.offset(p.parts[i].out_stride);
      Some some[kPieces] = {};
      for_each_piece(
          [&](int k, int32_t column) { some[k] = *reinterpret_cast<Some const*>(from + column); });
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sum[k][j] = fmaf(weight, static_cast<float>(some[k].x[j]), sum[k][j]);
        }
      }
    }
    for_each_piece([&](int k, int32_t column) {
      Some result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        result.x[j] = static_cast<Element>(sum[k][j]);
      }
      *reinterpret_cast<Some*>(to + column) = result;
    });
  }
}

template <class Element>
bool takes_whole_pieces(MergeProblem const& p) {
  constexpr int kWidth = kBytes / sizeof(Element);
  auto const fits = [&](void const* data, int64_t const(&stride)[MergeProblem::kMostDims]) {
    bool all = reinterpret_cast<uintptr_t>(data) % kBytes == 0;
    for (int d = 0; d < p.dims; ++d) {
      all = all && stride[d] % kWidth == 0;
    }
    return all;
  };
  bool all = p.head_dim % kWidth == 0 && fits(p.out, p.out_stride);
  for (int i = 0; i < p.count; ++i) {
    all = all && fits(p.parts[i].out, p.parts[i].out_stride);
  }
  return all;
}

template <class Element, int kWidth>
void launch(MergeProblem const& p, ExecutionContext const& context) {
  int const lanes = std::clamp(ceil_div(p.head_dim, kWidth * kPieces), 1, kThreads);
  int64_t const rows_of_block = kThreads / lanes;
  int64_t const blocks = (p.rows() + rows_of_block - 1) / rows_of_block;
  merge_parts_kernel<Element, kWidth>
      <<<grid_size(blocks, "a merge"), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
          p, static_cast<uint32_t>(p.rows()), lanes);
  check_cuda(cudaGetLastError(), "launching the merge of parts");
}

template <class Element>
void merge_elements(MergeProblem const& p, ExecutionContext const& context) {
  if (takes_whole_pieces<Element>(p)) {
    launch<Element, kBytes / sizeof(Element)>(p, context);
  } else {
    launch<Element, 1>(p, context);
  }
}

}  // namespace

void merge_parts(MergeProblem const& p, ExecutionContext const& context) {
  switch (p.dtype) {
    case DataType::kFloat16:
      return merge_elements<cutlass::half_t>(p, context);
    case DataType::kBFloat16:
      return merge_elements<cutlass::bfloat16_t>(p, context);
    case DataType::kFloat32:
      return merge_elements<float>(p, context);
    case DataType::kFloat64:
      break;
  }
  throw std::runtime_error(
      std::string("sparse_fmha: outs must have dtype float16, bfloat16 or float32 on CUDA, got ") +
      to_string(p.dtype));
}

}  // namespace sparse_fmha::device
