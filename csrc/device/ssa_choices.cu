// SSA's choice: a thread block walks the means of key blocks twice with the tokens next to each
// other of one key head, first for the log-sum-exp of each row, then for the weights.
#include "sparse_fmha/device/ssa_choices.h"

#include <algorithm>

#include "sparse_fmha/device/mma_launch.h"
#include "sparse_fmha/device/ssa_candidates.h"
#include "sparse_fmha/device/ssa_item.h"
#include "sparse_fmha/device/ssa_norms.h"
#include "sparse_fmha/device/ssa_scores.h"

namespace sparse_fmha::device {
namespace {

constexpr int kMostWarps = 8;
constexpr size_t kSharedBytes = 99 << 10;
constexpr float kLog2e = 1.4426950408889634f;

// A weight's place in shared memory, [token][kStride]: rows begin in different banks.
template <int kKeys>
constexpr int kStride = kKeys + 8;

// Calls body(first key, tile) for the tiles of `count` keys.
template <class Tile, class Body>
__device__ __forceinline__ void walk(SsaChoices const& p, SsaItem const& item, int32_t count,
                                     uint4* memory, Body const& body) {
  int32_t const size = p.parts * Tile::kPart;
  __syncthreads();  // the walk before has ended
  Tile::copy(p, item.entry, item.head_kv, 0, count, memory);
  cutlass::arch::cp_async_fence();
#pragma unroll 1
  for (int32_t first = 0, turn = 0; first < count; first += Tile::kKeys, turn ^= 1) {
    cutlass::arch::cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the one before has been read
    if (first + Tile::kKeys < count) {
      Tile::copy(p, item.entry, item.head_kv, first + Tile::kKeys, count,
                 memory + (turn ^ 1) * size);
    }
    cutlass::arch::cp_async_fence();
    body(first, memory + turn * size);
  }
  cutlass::arch::cp_async_wait<0>();
}

// Hides the scores of keys from `first` on that a token's softmax does not have.
template <int kOctets>
__device__ __forceinline__ void hide(SsaParams const& params, SsaItem const& item, int32_t first,
                                     SsaScores<kOctets / 2>& scores) {
  int32_t const key = first + static_cast<int32_t>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    int32_t const end = params.p.complete(item.token_of(params, o));
#pragma unroll
    for (int i = 0; i < kSsaKeys / 4; ++i) {
      float& score = scores.at(o, i / 2, i % 2);
      score = key + i / 2 * 8 + i % 2 < end ? score : -INFINITY;
    }
  }
}

// Adds up a lane's heads of each token and writes the sums of keys from `to` on, [token][kStride].
template <int kOctets>
__device__ __forceinline__ void write_sums(SsaParams const& params, int stride,
                                           SsaScores<kOctets / 2>& weights, float* to) {
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < kOctets; step *= 2) {
    if (step < params.heads.value()) {
#pragma unroll
      for (int o = 0; o < kOctets; o += 2 * step) {
#pragma unroll
        for (int i = 0; i < kSsaKeys / 4; ++i) {
          weights.at(o, i / 2, i % 2) += weights.at(o + step, i / 2, i % 2);
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    if (params.heads.rest(o) == 0) {
      float* const row = to + (params.heads.divide(o) * 8 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
      for (int eight = 0; eight < kSsaKeys / 8; ++eight) {
        *reinterpret_cast<float2*>(row + 8 * eight) = {weights.at(o, eight, 0),
                                                       weights.at(o, eight, 1)};
      }
    }
  }
}

// Shared memory, of the warps of a block: weights of tiles, then the candidates of tokens.
struct SsaMemory {
  float* sums;  // [warp][token of the team][kStride]
  SsaKept* kept;
  SsaCandidate* candidates;  // [token][capacity]
};

// Whose candidates a warp keeps: some of its team's tokens.
struct SsaOwn {
  int32_t tokens;
  int32_t first;  // token
  int32_t place;  // in the memory of the block

  __device__ __forceinline__ SsaOwn(SsaParams const& params, SsaItem const& item)
      : tokens(params.team.divide(params.tokens)),
        first(item.token + item.member * tokens),
        place(item.warp * tokens) {}
};

// Adds the blocks of a tile, from `block` on, to the candidates of a warp's tokens.
template <int kKeys>
__device__ __forceinline__ void add_tile(SsaParams const& params, SsaItem const& item,
                                         SsaMemory const& memory, int32_t block) {
  SsaOwn const own(params, item);
  int32_t const of_warp = params.tokens * kStride<kKeys>;
  float const* const sums = memory.sums + (item.warp - item.member) * of_warp +
                            item.member * own.tokens * kStride<kKeys> + threadIdx.x % 32;
#pragma unroll 1
  for (int32_t i = 0; i < own.tokens; ++i) {
    float weight = 0;
    for (int32_t w = 0; w < params.team.value(); ++w) {
      weight += sums[w * of_warp + i * kStride<kKeys>];
    }
    add_candidates<kKeys>(memory.candidates + (own.place + i) * params.capacity,
                          memory.kept[own.place + i], weight, block, params.p.few, params.capacity);
  }
}

__device__ __forceinline__ void write_choices(SsaParams const& params, SsaItem const& item,
                                              SsaMemory const& memory) {
  SsaChoices const& p = params.p;
  SsaOwn const own(params, item);
  int32_t const lane = threadIdx.x % 32;
#pragma unroll 1
  for (int32_t i = 0; i < min_int(own.tokens, p.q_len - own.first); ++i) {
    SsaCandidate* const candidates = memory.candidates + (own.place + i) * params.capacity;
    int32_t count = memory.kept[own.place + i].count;
    if (count > p.few) {
      keep_largest(candidates, count, p.few);
      count = p.few;
    }
    int32_t* const to = p.row(item.entry, item.head_kv, own.first + i);
    for (int32_t j = lane; j < p.few; j += 32) {
      to[j] = j < count ? candidates[j].block : -1;
    }
    if (lane == 0) {
      to[p.few] = p.own(own.first + i);
    }
  }
}

template <class Element, int kDim>
__global__ void __launch_bounds__(32 * kMostWarps, 2) choose_blocks(SsaParams const params) {
  using Tile = SsaTile<Element, kDim>;
  using Scores = typename Tile::Scores;
  constexpr int kOctets = Tile::kOctets;
  constexpr int kKeys = Tile::kKeys;
  extern __shared__ uint4 shared[];
  SsaChoices const& p = params.p;
  SsaItem const item(params);
  int32_t const lane = threadIdx.x % 32;
  uint4* const tiles = shared;
  SsaMemory memory;
  memory.sums = reinterpret_cast<float*>(tiles + 2 * p.parts * Tile::kPart);
  memory.kept =
      reinterpret_cast<SsaKept*>(memory.sums + blockDim.x / 32 * params.tokens * kStride<kKeys>);
  memory.candidates =
      reinterpret_cast<SsaCandidate*>(memory.kept + params.tokens_of(blockDim.x / 32));
  float const scale_log2 = static_cast<float>(p.scale) * kLog2e;

  Element const* pointers[kOctets];
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    int32_t const token = item.token_of(params, o);
    int32_t const head = item.head_of(params, o);
    bool const there = token < p.q_len && head < p.group();
    pointers[o] =
        there ? p.query<Element>(item.entry, token, item.head_kv * p.group() + head) : nullptr;
  }
  SsaRows<Element, kDim> const rows(pointers, p.head_dim);
  int32_t const last = item.first + item.count - 1;
  int32_t const most = p.few == 0 ? 0 : p.before(last);
  int32_t const whole = p.complete(item.first);  // keys that all tokens have in their softmax
  SsaNorms<kOctets> norms;
  walk<Tile>(p, item, most == 0 ? 0 : p.complete(last), tiles,
             [&](int32_t first, uint4 const* tile) {
#pragma unroll 1
               for (int key = 0; key < kKeys; key += kSsaKeys) {
                 Scores scores;
                 rows.multiply(tile, p.parts, key, scores);
                 scores.scale(scale_log2);
                 if (first + key + kSsaKeys > whole) {
                   hide<kOctets>(params, item, first + key, scores);
                 }
                 norms.add(scores);
               }
             });
  norms.finish();
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    if (item.head_of(params, o) >= p.group()) {
      norms.top[o] = INFINITY;  // there is no such head: its weights are 0
    }
  }

  SsaOwn const own(params, item);
  for (int32_t i = lane; i < own.tokens; i += 32) {
    int32_t const token = own.first + i;
    memory.kept[own.place + i] = {0, -1.f, token < p.q_len ? p.before(token) : 0};
  }
  walk<Tile>(p, item, most, tiles, [&](int32_t first, uint4 const* tile) {
#pragma unroll 1
    for (int key = 0; key < kKeys; key += kSsaKeys) {
      Scores scores;
      rows.multiply(tile, p.parts, key, scores);
      norms.weigh(scores, scale_log2);
      write_sums<kOctets>(params, kStride<kKeys>, scores,
                          memory.sums + item.warp * params.tokens * kStride<kKeys> + key);
    }
    if (params.team.value() > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    add_tile<kKeys>(params, item, memory, first);
    __syncwarp();  // all have read the sums
  });
  __syncwarp();
  write_choices(params, item, memory);
}

template <class Element, int kDim>
void launch(SsaChoices const& p, ExecutionContext const& context) {
  using Tile = SsaTile<Element, kDim>;
  char const* const what = "SSA's choice of blocks";
  SsaParams params;
  params.p = p;
  params.heads = PowerOfTwo::from(std::min<int32_t>(Tile::kOctets, p.group()));
  params.team = PowerOfTwo::from(ceil_div(p.group(), params.heads.value()));
  params.tokens = 8 * params.heads.divide(Tile::kOctets);
  // Room for some before the largest are found once more.
  params.capacity = ceil_div(p.few + std::max(48, p.few / 2), 32) * 32 + 32;
  int32_t warps = 2 * kMostWarps;
  size_t bytes = 0;
  do {
    warps /= 2;
    bytes = 2 * p.parts * Tile::kPart * sizeof(uint4) +
            warps * params.tokens * kStride<Tile::kKeys> * sizeof(float) +
            params.tokens_of(warps) * (sizeof(SsaKept) + params.capacity * sizeof(SsaCandidate));
  } while (bytes > kSharedBytes && warps > params.team.value());
  params.groups = ceil_div(p.q_len, params.tokens_of(warps));
  auto* const kernel = &choose_blocks<Element, kDim>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "raising the shared-memory limit");
  int64_t const blocks = int64_t{params.groups} * p.batch * p.heads_kv;
  kernel<<<grid_size(blocks, what), 32 * warps, bytes, static_cast<cudaStream_t>(context.stream)>>>(
      params);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace

void choose_ssa_blocks(SsaChoices const& p, ExecutionContext const& context) {
  if (p.dtype != DataType::kFloat32) {
    with_mma_types(p.dtype, p.head_dim, [&](auto element, auto dim) {
      launch<decltype(element), decltype(dim)::value>(p, context);
    });
  } else if (p.head_dim <= 128) {
    launch<float, 128>(p, context);
  } else {
    launch<float, 256>(p, context);
  }
}

}  // namespace sparse_fmha::device
