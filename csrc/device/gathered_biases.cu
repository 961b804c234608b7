// Biases of copied keys, and their gradients.
#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/gathered_keys.h"
#include "sparse_fmha/device/gathered_rows.h"
#include "sparse_fmha/device/warp_rows.h"

namespace sparse_fmha::device {
namespace {

struct Biases {
  TokenNumbers from;  // at the part
  float* to;          // [batch, heads_q, groups, capacity]
  ListRows lists;
  int32_t const* tokens;
  int32_t capacity;
  int32_t heads_q;
  int64_t copies;  // in all
};

// A thread copies a bias; places behind the last key become 0.
__global__ void __launch_bounds__(kRowThreads) gather_biases(Biases const p) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (index >= p.copies) {
    return;
  }
  auto const place = static_cast<int32_t>(index % p.capacity);
  int64_t rest = index / p.capacity;
  auto const group = static_cast<int32_t>(rest % p.lists.groups);
  rest /= p.lists.groups;
  auto const head = static_cast<int32_t>(rest % p.heads_q);
  auto const batch = static_cast<int32_t>(rest / p.heads_q);
  int32_t const token = p.tokens[(p.lists.first(batch, head) + group) * p.capacity + place];
  float const* const from = p.from.data + batch * p.from.batch_stride + head * p.from.head_stride;
  p.to[index] = token == kNoToken ? 0.f : __ldg(from + token);
}

struct AddBiases {
  float const* from;  // [batch, heads_q, groups, capacity]
  float* to;          // [B, Hq, keys], at the part
  ListRows lists;
  uint32_t const* listed;
  int32_t const* ranks;
  int32_t words;
  int32_t capacity;
  int32_t heads_q;    // of the part
  int32_t all_heads;  // of `to`
  int32_t len_kv;
  int64_t rows;  // batch * heads_q
};

// A warp adds up those of 32 keys, in the order of groups.
__global__ void __launch_bounds__(kRowThreads) add_biases(AddBiases const p) {
  int64_t const index = row_of_warp();
  auto const word = static_cast<int32_t>(index % p.words);
  int64_t const row = index / p.words;
  if (row >= p.rows) {
    return;
  }
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  auto const head = static_cast<int32_t>(row % p.heads_q);
  auto const batch = static_cast<int32_t>(row / p.heads_q);
  int64_t const first = p.lists.first(batch, head);
  float sum = 0;
  for (int32_t group = 0; group < p.lists.groups; ++group) {
    int64_t const at = (first + group) * p.words + word;
    uint32_t const bits = p.listed[at];
    if ((bits >> lane & 1) != 0) {
      int32_t const place = p.ranks[at] + __popc(bits & ((1u << lane) - 1));
      sum += p.from[(row * p.lists.groups + group) * p.capacity + place];
    }
  }
  int32_t const token = 32 * word + lane;
  if (token < p.len_kv) {
    p.to[(int64_t{batch} * p.all_heads + head) * p.len_kv + token] = sum;
  }
}

}  // namespace

void gather_biases(FmhaProblem const& p, ListedKeys const& keys, GatheredPart const& part,
                   GatheredKeys& gathered, ExecutionContext const& context) {
  FmhaProblem& lists = gathered.problem;
  Biases biases = {};
  biases.lists = list_rows(p, part);
  auto at_part = [&](TokenNumbers numbers) {
    if (numbers.data != nullptr) {
      numbers.data += part.first_batch * numbers.batch_stride +
                      biases.lists.first_query_head * numbers.head_stride;
    }
    return numbers;
  };
  lists.row_threshold = at_part(p.row_threshold);
  if (p.key_bias.data == nullptr) {
    return;
  }
  auto* const stream = static_cast<cudaStream_t>(context.stream);
  int64_t const of_head = keys.blocks.len_kv;
  biases.copies = int64_t{lists.batch} * lists.heads_q * of_head;
  biases.from = at_part(p.key_bias);
  biases.to = allocate<float>(context, biases.copies);
  biases.tokens = keys.tokens;
  biases.capacity = keys.capacity;
  biases.heads_q = lists.heads_q;
  int64_t const blocks = (biases.copies + kRowThreads - 1) / kRowThreads;
  gather_biases<<<grid_size(blocks, "the biases of listed keys"), kRowThreads, 0, stream>>>(biases);
  check_cuda(cudaGetLastError(), "launching the copy of biases");
  lists.key_bias = {biases.to, lists.heads_q * of_head, of_head};
  if (p.gradients->key_bias != nullptr) {
    auto* const sums = allocate<float>(context, biases.copies);
    // Kernels leave out the heads in which no query sees a key tile.
    check_cuda(cudaMemsetAsync(sums, 0, static_cast<size_t>(biases.copies) * sizeof(float), stream),
               "clearing the gradients of biases");
    gathered.gradients.key_bias = sums;
  }
}

void add_biases(FmhaProblem const& p, ListedKeys const& keys, GatheredPart const& part,
                GatheredKeys const& gathered, ExecutionContext const& context) {
  if (p.gradients->key_bias == nullptr) {
    return;
  }
  AddBiases add = {};
  add.lists = list_rows(p, part);
  add.len_kv = std::get<Stripe::Params>(p.sparsity).len_kv;
  add.from = gathered.gradients.key_bias;
  int64_t const first = int64_t{part.first_batch} * p.heads_q + add.lists.first_query_head;
  add.to = p.gradients->key_bias + first * add.len_kv;
  add.listed = keys.listed;
  add.ranks = keys.ranks;
  add.words = keys.words;
  add.capacity = keys.capacity;
  add.heads_q = gathered.problem.heads_q;
  add.all_heads = p.heads_q;
  add.rows = int64_t{part.batch} * add.heads_q;
  add_biases<<<row_blocks(add.rows * add.words, "the biases of keys"), kRowThreads, 0,
               static_cast<cudaStream_t>(context.stream)>>>(add);
  check_cuda(cudaGetLastError(), "launching the sums of gradients of biases");
}

}  // namespace sparse_fmha::device
