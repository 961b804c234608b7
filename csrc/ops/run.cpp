#include "run.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "check.h"
#include "placement.h"
#include "skipped_tiles.h"
#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/cuda/device_arch.h"
#include "sparse_fmha/planning/choose_row.h"
#include "sparse_fmha/planning/class_boxes.h"

namespace sparse_fmha {
namespace {

using torch::headeronly::ScalarType;

class TorchThreads : public ParallelFor {
 public:
  int num_threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) const override {
    torch::stable::parallel_for(0, n, 1,
                                [&](int64_t begin, int64_t end) { body(arg, begin, end); });
  }
};

}  // namespace

Arch arch_of(Tensor const& q) {
  if (on_cpu(q)) {
    return Arch::kCpu;
  }
  static bool const any = std::any_of(std::begin(kGpuArchs), std::end(kGpuArchs),
                                      [](GpuArch const& row) { return is_built(row.arch); });
  if (!any) {
    require(false, "q must be on the CPU, because this build has no GPU kernels, got ",
            device_of(q), "; build with nvcc >= 12.5 and SPARSE_FMHA_ARCHS=", buildable_archs());
  }
  return device_arch(gpu_of(q));
}

namespace {

// Thresholds have no rows of their own: what reads them is part of other rows. Returns the smallest
// head dim of a row that does (sm90/geometry/, kRowThresholds).
int32_t head_dim_with_thresholds(FmhaProblem const& problem, Arch arch, Pass pass) {
  constexpr int32_t kLargestOfBlocks = 128;
  constexpr int32_t kSmallestOfStripes = 72;  // in dQ
  bool const by_blocks = std::holds_alternative<BlockSparse::Params>(problem.sparsity);
  bool const fits = !by_blocks || std::max(problem.head_dim, problem.value_dim) <= kLargestOfBlocks;
  if (arch == Arch::kCpu) {
    return problem.head_dim;
  }
  if (arch == Arch::kSm90 && fits) {
    bool const few_registers = !by_blocks && pass == Pass::kBackwardDq;
    return std::max(problem.head_dim, few_registers ? kSmallestOfStripes : 0);
  }
  throw not_implemented(std::string("sparse_fmha: row_threshold has no kernels of ") +
                        to_string(arch) + (fits ? "" : " for block lists and head dims above 128") +
                        "; move the tensors to the CPU");
}

}  // namespace

KernelKey key_of(FmhaProblem const& problem, Tensor const& q, Pass pass) {
  Arch const arch = arch_of(q);
  bool const has_thresholds = problem.row_threshold.data != nullptr;
  bool const skips = problem.skip_threshold != nullptr;
  bool const biased =
      problem.key_bias.data != nullptr || (problem.softcap != 0 && pass != Pass::kDecode);
  // Other passes, and calls with thresholds or biases, launch interleaved grids one by one.
  bool const is_dilated = arch == Arch::kSm90 && pass == Pass::kForward && !skips && !biased &&
                          takes_class_boxes(problem);
  return {arch,
          pass,
          problem.dtype,
          has_thresholds ? head_dim_with_thresholds(problem, arch, pass) : problem.head_dim,
          problem.value_dim,
          static_cast<int32_t>(problem.sparsity.index()),
          skips,
          biased,
          problem.packed != nullptr,
          is_dilated};
}

KernelRow const& kernel_for(FmhaProblem const& problem, Tensor const& q, Pass pass) {
  KernelKey const key = key_of(problem, q, pass);
  int32_t const tile_q =
      on_cpu(q) ? 0 : choose_tile_q(key, problem, device_multiprocessors(gpu_of(q)));
  bool const by_bias = key.key_bias && problem.softcap != 0;
  if (by_bias && look_for_kernel(key, tile_q) == nullptr) {
    throw not_implemented(
        "sparse_fmha: softcap runs on the CPU and where key_bias does: no kernel for " +
        to_string(key) + "; move the tensors to the CPU");
  }
  return find_kernel(key, tile_q);
}

float const* checked_threshold(Tensor const& threshold, Tensor const& q) {
  require(threshold.scalar_type() == ScalarType::Float,
          "skip_threshold must have dtype float32, got ",
          torch::headeronly::toString(threshold.scalar_type()));
  require(threshold.dim() == 1 && threshold.size(0) == q.size(0),
          "skip_threshold must have shape [", q.size(0), "], one entry for each batch entry, got ",
          shape_of(threshold));
  require(on_one_device(threshold, q), "skip_threshold must be on q's device, ", device_of(q),
          ", got ", device_of(threshold));
  require(threshold.size(0) <= 1 || threshold.stride(0) == 1,
          "skip_threshold must be contiguous, got stride ", threshold.stride(0));
  static float const nowhere = 0;  // an empty tensor may have no address
  return q.size(0) == 0 ? &nowhere : static_cast<float const*>(threshold.data_ptr());
}

Launch::Launch(Tensor const& q) : like_(q) {
  context_.memory = this;
  if (on_gpu(q)) {
    context_.stream = current_stream(q);
  } else {
    context_.parallel = &torch_threads();
  }
}

void* Launch::allocate(size_t bytes) {
  tensors_.push_back(new_tensor(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
  return tensors_.back().data_ptr();
}

ParallelFor const& torch_threads() {
  static TorchThreads const threads;
  return threads;
}

std::vector<int64_t> sizes_of(Tensor const& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) {
    sizes[d] = t.size(d);
  }
  return sizes;
}

std::vector<int64_t> sizes_of_out(FmhaProblem const& problem, Tensor const& q) {
  std::vector<int64_t> sizes = sizes_of(q);
  sizes.back() = problem.value_dim;
  return sizes;
}

// Bypasses the dispatcher, which takes longer than the allocation.
Tensor new_tensor(Tensor const& like, std::vector<int64_t> const& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t type = 0;
  int32_t index = 0;
  AtenTensorHandle result = nullptr;
  bool const made = aoti_torch_get_device_type(like.get(), &type) == 0 &&
                    aoti_torch_get_device_index(like.get(), &index) == 0 &&
                    aoti_torch_empty_strided(
                        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                        type, index, &result) == 0;
  require(made, "PyTorch cannot allocate a tensor; see its message above");
  return Tensor(result);
}

void launch_into(KernelRow const& kernel, FmhaProblem& problem, Tensor const& q, Tensor const& out,
                 Tensor const& lse) {
  if (out.numel() == 0) {
    return;
  }
  if (volume(problem.grid_kv) == 0 && problem.extra_len == 0) {
    torch::stable::fill_(out, 0.0);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return;
  }
  problem.lse = static_cast<float*>(lse.data_ptr());
  Launch launch(q);
  kernel.launch(problem, launch.context());
}

namespace {

void check_result(char const* name, Tensor const& t, std::vector<int64_t> const& sizes,
                  ScalarType dtype, int64_t alignment, Tensor const& q) {
  require(sizes_of(t) == sizes && t.scalar_type() == dtype && on_one_device(t, q), name,
          " must have the result's shape, dtype and device, got shape ", shape_of(t), ", ",
          torch::headeronly::toString(t.scalar_type()), ", on ", device_of(t));
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0 && t.numel() != 0;) {
    require(sizes[d] == 1 || t.stride(d) == stride, name, " must be contiguous, got stride ",
            t.stride(d), " in dimension ", d);
    stride *= sizes[d];
  }
  require(t.numel() == 0 || is_aligned(t, alignment), name, " must start at a multiple of ",
          alignment, " bytes");
}

}  // namespace

void run_into(FmhaProblem& problem, Tensor const& q, Tensor const& out, Tensor const& lse) {
  std::vector<int64_t> sizes = sizes_of_out(problem, q);
  constexpr int64_t kOfCopies = 16;
  check_result("out", out, sizes, q.scalar_type(), kOfCopies, q);
  sizes.pop_back();
  check_result("lse", lse, sizes, ScalarType::Float, sizeof(float), q);
  DeviceScope const scope(q);
  problem.out = view(out);
  launch_into(kernel_for(problem, q, Pass::kForward), problem, q, out, lse);
}

std::vector<Tensor> run(FmhaProblem& problem, Tensor const& q,
                        std::optional<Tensor> const& skip_threshold, bool save_skipped) {
  if (skip_threshold) {
    problem.skip_threshold = checked_threshold(*skip_threshold, q);
  }
  KernelRow const& kernel = kernel_for(problem, q, Pass::kForward);
  DeviceScope const scope(q);
  std::vector<int64_t> sizes = sizes_of_out(problem, q);
  Tensor out = new_tensor(q, sizes, q.scalar_type());
  sizes.pop_back();
  Tensor lse = new_tensor(q, sizes, ScalarType::Float);
  std::vector<Tensor> results = {out, lse};
  if (skip_threshold) {
    Tensor tiles = new_tensor(q, {problem.batch, problem.heads_q, 2}, ScalarType::Long);
    torch::stable::fill_(tiles, 0.0);
    problem.skip_counts = static_cast<int64_t*>(tiles.data_ptr());
    results.push_back(tiles);
    if (save_skipped) {
      results.push_back(new_skipped_tiles(problem, q));
    }
  }
  problem.out = view(out);
  launch_into(kernel, problem, q, out, lse);
  return results;
}

}  // namespace sparse_fmha
