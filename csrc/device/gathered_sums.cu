// Sums of the gradients of copied keys.
#include <cutlass/numeric_types.h>

#include "sparse_fmha/device/gathered_keys.h"
#include "sparse_fmha/device/gathered_rows.h"
#include "sparse_fmha/device/warp_rows.h"

namespace sparse_fmha::device {
namespace {

constexpr int kLaneElements = 4;  // of a row, added up together
constexpr int kHits = 512;        // groups whose words a thread block holds

struct Add {
  struct Tensor {
    uint16_t const* from;  // [batch, heads of copies, keys, dim]
    TensorView to;         // at the part
    int32_t dim;
  } of[2];
  ListRows lists;
  uint32_t const* listed;
  int32_t const* ranks;
  int32_t words;
  int32_t capacity;
  int32_t heads;  // of keys, in the part
  int32_t len_kv;
};

// Four elements of every 128, of a row.
template <class Element, int kPieces>
struct Piece {
  uint2 raw[kPieces];

  __device__ __forceinline__ static int32_t column(int piece) {
    return (piece * kWarp + static_cast<int32_t>(threadIdx.x % kWarp)) * kLaneElements;
  }
  // `row` may be nullptr: zeros.
  __device__ __forceinline__ void load(uint16_t const* row, int32_t dim) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      bool const there = row != nullptr && column(piece) < dim;
      raw[piece] = there ? __ldg(reinterpret_cast<uint2 const*>(row + column(piece))) : uint2{0, 0};
    }
  }
  __device__ __forceinline__ void add_to(float (&sums)[kPieces][kLaneElements]) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      auto const* const numbers = reinterpret_cast<Element const*>(&raw[piece]);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        sums[piece][i] += static_cast<float>(numbers[i]);
      }
    }
  }
  __device__ __forceinline__ void round(float const (&sums)[kPieces][kLaneElements]) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      auto* const numbers = reinterpret_cast<Element*>(&raw[piece]);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        numbers[i] = Element(sums[piece][i]);
      }
    }
  }
  __device__ __forceinline__ void store(uint16_t* row, int32_t dim) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (column(piece) < dim) {
        *reinterpret_cast<uint2*>(row + column(piece)) = raw[piece];
      }
    }
  }
};

// A thread block has 32 keys of a head, each warp four of them, one after another. A lane looks up
// one group at a time; all add those that list the key, in ascending order. Several rows are loaded
// before the first is added.
template <class Element, int kPieces>
__global__ void __launch_bounds__(kRowThreads) add_rows(Add const p) {
  constexpr int kWarpKeys = kWarp / kRowWarps;
  constexpr int kAhead = 4 / kPieces;
  __shared__ uint32_t words[kHits];
  __shared__ int32_t ranks[kHits];
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  int64_t rest = blockIdx.x;
  auto const word = static_cast<int32_t>(rest % p.words);
  rest /= p.words;
  auto const head = static_cast<int32_t>(rest % p.heads);
  auto const batch = static_cast<int32_t>(rest / p.heads);
  int32_t const first_copy = head * p.lists.copies;
  int32_t const all = p.lists.copies * p.lists.groups;  // copies are beside each other
  int64_t const first_row = p.lists.first(batch, first_copy);
  int64_t const first_key = (int64_t{batch} * p.heads * p.lists.copies + first_copy) *
                            int64_t{p.lists.groups} * p.capacity;
#pragma unroll 1
  for (int key = 0; key < kWarpKeys; ++key) {
    int32_t const bit = static_cast<int32_t>(threadIdx.x) / kWarp * kWarpKeys + key;
    float sums[2][kPieces][kLaneElements] = {};
    for (int32_t first = 0; first < all; first += kHits) {
      int32_t const count = min(kHits, all - first);
      if (key == 0 || all > kHits) {
        __syncthreads();  // the last words have been read
        for (auto i = static_cast<int32_t>(threadIdx.x); i < kHits; i += kRowThreads) {
          int64_t const at = (first_row + first + i) * p.words + word;
          words[i] = i < count ? p.listed[at] : 0;
          ranks[i] = i < count ? p.ranks[at] : 0;
        }
        __syncthreads();
      }
      for (int32_t i = 0; i < count; i += kWarp) {
        uint32_t const bits = words[i + lane];
        int64_t const place = (int64_t{first} + i + lane) * p.capacity + ranks[i + lane] +
                              __popc(bits & ((1u << bit) - 1));
        uint32_t hits = __ballot_sync(kAllLanes, (bits >> bit & 1) != 0);
        while (hits != 0) {
          Piece<Element, kPieces> pieces[kAhead][2];
#pragma unroll
          for (int n = 0; n < kAhead; ++n) {
            bool const there = hits != 0;
            int const source = there ? __ffs(hits) - 1 : 0;
            int64_t const row = first_key + __shfl_sync(kAllLanes, place, source);
            hits &= hits - 1;
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              pieces[n][t].load(there ? p.of[t].from + row * p.of[t].dim : nullptr, p.of[t].dim);
            }
          }
#pragma unroll
          for (int n = 0; n < kAhead; ++n) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              pieces[n][t].add_to(sums[t]);
            }
          }
        }
      }
    }
    int32_t const token = 32 * word + bit;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      TensorView const& to = p.of[t].to;
      auto* const row = static_cast<uint16_t*>(to.data) + batch * to.batch_stride +
                        head * to.head_stride + token * to.axis_stride[kGridAxes - 1];
      if (token < p.len_kv) {
        Piece<Element, kPieces> rounded;
        rounded.round(sums[t]);
        rounded.store(row, p.of[t].dim);
      }
    }
  }
}

template <class Element>
void launch_add(Add const& add, int64_t blocks, cudaStream_t stream) {
  bool const wide = add.of[0].dim > 128 || add.of[1].dim > 128;
  auto* const kernel = wide ? &add_rows<Element, 2> : &add_rows<Element, 1>;
  kernel<<<grid_size(blocks, "the keys"), kRowThreads, 0, stream>>>(add);
  check_cuda(cudaGetLastError(), "launching the sums of gradients of keys");
}

}  // namespace

void add_gathered(FmhaProblem const& p, ListedKeys const& keys, GatheredPart const& part,
                  GatheredKeys const& gathered, ExecutionContext const& context) {
  Gradients const& from = gathered.gradients;
  Gradients const& to = *p.gradients;
  auto of = [&](TensorView const& sums, TensorView const& result, int32_t dim) -> Add::Tensor {
    return {static_cast<uint16_t const*>(sums.data),
            view_at(result, part.first_batch, part.first_head), dim};
  };
  auto const& stripe = std::get<Stripe::Params>(p.sparsity);
  Add const add = {{of(from.k, to.k, p.head_dim), of(from.v, to.v, p.value_dim)},
                   list_rows(p, part),
                   keys.listed,
                   keys.ranks,
                   keys.words,
                   keys.capacity,
                   part.heads,
                   stripe.len_kv};
  int64_t const blocks = int64_t{part.batch} * part.heads * keys.words;
  auto* const stream = static_cast<cudaStream_t>(context.stream);
  if (p.dtype == DataType::kFloat16) {
    launch_add<cutlass::half_t>(add, blocks, stream);
  } else {
    launch_add<cutlass::bfloat16_t>(add, blocks, stream);
  }
  add_biases(p, keys, part, gathered, context);
}

}  // namespace sparse_fmha::device
