// The ops with which AnchorAttention chooses distant keys (sparse_fmha/core/anchor.h).
#include "sparse_fmha/core/anchor.h"

#include <cmath>
#include <tuple>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"
#include "register.h"
#include "run.h"

namespace sparse_fmha {
namespace {

AnchorGrid grid_of(int64_t length, int64_t block, int64_t step) {
  require(block == 64 || block == 128, "block must be 64 or 128, got ", block);
  require(step >= 1 && step <= 2048 / block, "step must be from 1 to ", 2048 / block, " blocks of ",
          block, ", got ", step);
  require(length <= (1 << 30), "k must have at most 2^30 tokens, got ", length);
  return {static_cast<int32_t>(length), static_cast<int32_t>(block), static_cast<int32_t>(step)};
}

void check_heads(char const* name, int64_t heads_q, int64_t heads_kv) {
  require(heads_kv > 0 ? heads_q % heads_kv == 0 : heads_q == 0, "heads of ", name,
          " must be a multiple of those of k, got ", heads_q, " and ", heads_kv);
  require(heads_q <= INT32_MAX, name, " must have at most 2^31 - 1 heads, got ", heads_q);
}

// Launches on q's device and its current stream, or on torch's threads.
template <class Problem>
void launch(void (*AnchorKernels::*kernel)(Problem const&, ExecutionContext const&),
            Problem const& problem, Tensor const& q) {
  auto const run = anchor_kernels(arch_of(q)).*kernel;
  DeviceScope const scope(q);
  ExecutionContext context;
  if (on_gpu(q)) {
    context.stream = current_stream(q);
  } else {
    context.parallel = &torch_threads();
  }
  run(problem, context);
}

void check_dtype_on_device(char const* name, Tensor const& t, DataType dtype) {
  require(on_cpu(t) || dtype == DataType::kFloat16 || dtype == DataType::kBFloat16, name,
          " must have dtype float16 or bfloat16 on CUDA, got ",
          torch::headeronly::toString(t.scalar_type()));
}

Tensor anchor_means(Tensor q, Tensor k, int64_t block, int64_t step, double scale) {
  FmhaProblem const problem = make_problem(q, k, k, /*axes=*/1, scale);
  require(q.size(1) == k.size(1), "k must have the ", q.size(1), " tokens of q, got ", k.size(1));
  check_dtype_on_device("q", q, problem.dtype);
  AnchorGrid const grid = grid_of(k.size(1), block, step);
  Tensor means = new_tensor(q, {q.size(0), q.size(2), grid.blocks()}, ScalarType::Float);
  if (means.numel() != 0) {
    AnchorMeans const p = {grid,
                           problem.dtype,
                           problem.batch,
                           problem.heads_q,
                           problem.heads_kv,
                           problem.head_dim,
                           problem.q,
                           problem.k,
                           static_cast<float>(scale),
                           static_cast<float*>(means.data_ptr())};
    launch(&AnchorKernels::means, p, q);
  }
  return means;
}

// q_mean [B, H, blocks, D], whose last stride must be 1.
TensorView means_view(Tensor const& t) {
  TensorView view;
  view.data = t.data_ptr();
  view.batch_stride = t.stride(0);
  view.head_stride = t.stride(1);
  view.axis_stride[kGridAxes - 1] = t.stride(2);
  return view;
}

std::tuple<Tensor, Tensor> anchor_keys(Tensor q_mean, Tensor k, Tensor least, int64_t block,
                                       int64_t step) {
  DataType const dtype = check_operand("k", k, 4);
  check_dtype_on_device("k", k, dtype);
  AnchorGrid const grid = grid_of(k.size(1), block, step);
  require(q_mean.dim() == 4 && q_mean.size(0) == k.size(0) && q_mean.size(2) == grid.blocks() &&
              q_mean.size(3) == k.size(3),
          "q_mean must have shape [", k.size(0), ", any, ", grid.blocks(), ", ", k.size(3),
          "] (batch, heads, query blocks, head dim), got ", shape_of(q_mean));
  int64_t const heads = q_mean.size(1);
  check_heads("q_mean", heads, k.size(2));
  require(q_mean.scalar_type() == ScalarType::Float, "q_mean must have dtype float32, got ",
          torch::headeronly::toString(q_mean.scalar_type()));
  require(q_mean.numel() == 0 || q_mean.stride(3) == 1,
          "q_mean must have stride 1 in its last dimension, got ", q_mean.stride(3));
  require(on_one_device(q_mean, k), "q_mean must be on k's device");
  check_list("least", least, ScalarType::Float, {k.size(0), heads, grid.blocks()}, q_mean);

  Tensor bits =
      new_tensor(k, {k.size(0), heads, grid.superblocks(), grid.words()}, ScalarType::Int);
  Tensor counts = new_tensor(k, {k.size(0), heads, grid.superblocks()}, ScalarType::Int);
  if (counts.numel() != 0) {
    AnchorKeys const p = {grid,
                          dtype,
                          static_cast<int32_t>(k.size(0)),
                          static_cast<int32_t>(heads),
                          static_cast<int32_t>(k.size(2)),
                          static_cast<int32_t>(k.size(3)),
                          means_view(q_mean),
                          view(k),
                          static_cast<float const*>(least.data_ptr()),
                          static_cast<uint32_t*>(bits.data_ptr()),
                          static_cast<int32_t*>(counts.data_ptr())};
    launch(&AnchorKernels::keys, p, k);
  }
  return {bits, counts};
}

std::tuple<Tensor, Tensor> anchor_columns(Tensor bits, int64_t first, int64_t width) {
  require(on_cpu(bits) || on_gpu(bits), "bits must be on cpu or cuda");
  check_list("bits", bits, ScalarType::Int, {-1, -1, -1, -1}, bits);
  require(width >= 0 && width <= (1 << 30), "width must be from 0 to 2^30, got ", width);
  require(first >= 0 && bits.size(3) <= (1 << 25) && first <= (1 << 30),
          "first and the words of bits must be at most 2^30 and 2^25, got ", first, " and ",
          bits.size(3));
  Tensor columns =
      new_tensor(bits, {bits.size(0), bits.size(1), bits.size(2), width}, ScalarType::Int);
  Tensor counts = new_tensor(bits, {bits.size(0), bits.size(1), bits.size(2)}, ScalarType::Int);
  if (counts.numel() != 0) {
    AnchorColumns const p = {counts.numel(),
                             static_cast<int32_t>(bits.size(3)),
                             static_cast<int32_t>(first),
                             static_cast<int32_t>(width),
                             static_cast<uint32_t const*>(bits.data_ptr()),
                             static_cast<int32_t*>(columns.data_ptr()),
                             static_cast<int32_t*>(counts.data_ptr())};
    launch(&AnchorKernels::columns, p, bits);
  }
  return {columns, counts};
}

}  // namespace

SPARSE_FMHA_OP(anchor_means, "(Tensor q, Tensor k, int block, int step, float scale) -> Tensor")

SPARSE_FMHA_OP(anchor_keys,
               "(Tensor q_mean, Tensor k, Tensor least, int block, int step)"
               " -> (Tensor bits, Tensor counts)")

SPARSE_FMHA_OP(anchor_columns,
               "(Tensor bits, int first, int width) -> (Tensor columns, Tensor counts)")

}  // namespace sparse_fmha
