#include "backward.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

#include "check.h"
#include "device_scope.h"
#include "run.h"
#include "sparse_fmha/device/row_terms.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

TensorView like_q(char const* name, Tensor& t, Tensor const& q, bool contiguous) {
  require(same_shape(t, q), name, " has shape ", shape_of(t), ", q has ", shape_of(q),
          "; they must be the same");
  check_like_q(name, t, q);
  int64_t const last = t.dim() - 1;
  if (contiguous || (t.size(last) != 1 && t.stride(last) != 1)) {
    t = torch::stable::contiguous(t);
  }
  check_operand(name, t, q.dim());
  return view(t);
}

float const* rows_of_q(char const* name, Tensor& t, Tensor const& q) {
  bool same = t.dim() == q.dim() - 1;
  for (int64_t d = 0; same && d < t.dim(); ++d) {
    same = t.size(d) == q.size(d);
  }
  require(same, name, " has shape ", shape_of(t), ", q has ", shape_of(q),
          "; the same without the head dim is needed");
  require(t.scalar_type() == ScalarType::Float, name, " has dtype ",
          torch::headeronly::toString(t.scalar_type()), "; float32 is needed");
  require(on_one_device(t, q), name, " and q are on different devices; all must be on one");
  t = torch::stable::contiguous(t);
  if (!is_aligned(t, t.element_size())) {
    t = torch::stable::clone(t);
  }
  return static_cast<float const*>(t.data_ptr());
}

Tensor new_gradient(Tensor const& like, bool wanted) {
  std::vector<int64_t> const sizes =
      wanted ? sizes_of(like) : std::vector<int64_t>{like.size(0), 0};
  return new_tensor(like, sizes, like.scalar_type());
}

namespace {

// Python raises NotImplementedError for errors with this text.
constexpr char const* kOnCpuOnly = "the backward pass of this mechanism runs on the CPU only yet";

KernelRow const& kernel_of(FmhaProblem const& problem, Tensor const& q, Pass pass) {
  bool const on_cpu = arch_of(q) == Arch::kCpu;
  try {
    return kernel_for(problem, q, pass);
  } catch (std::runtime_error const& miss) {
    if (on_cpu) {
      throw;
    }
    throw std::runtime_error(std::string("sparse_fmha: ") + kOnCpuOnly + "\n" + miss.what());
  }
}

}  // namespace

std::vector<Tensor> run_backward(FmhaProblem& problem, Tensor const& q, Tensor const& k,
                                 std::optional<Tensor> const& extra_k, BackwardArguments given) {
  KernelRow const* const of_queries =
      given.need_dq ? &kernel_of(problem, q, Pass::kBackwardDq) : nullptr;
  KernelRow const* const of_keys =
      given.need_dkv ? &kernel_of(problem, q, Pass::kBackwardDkv) : nullptr;
  DeviceScope const scope(q);
  Gradients gradients;
  gradients.out = like_q("dout", given.dout, q, /*contiguous=*/false);
  problem.out = like_q("out", given.out, q, /*contiguous=*/true);
  // Kernels only read it in this pass.
  problem.lse = const_cast<float*>(rows_of_q("lse", given.lse, q));
  gradients.lse = given.dlse ? rows_of_q("dlse", *given.dlse, q) : nullptr;

  std::vector<Tensor> results = {new_gradient(q, given.need_dq), new_gradient(k, given.need_dkv),
                                 new_gradient(k, given.need_dkv)};
  if (extra_k) {
    results.push_back(new_gradient(*extra_k, given.need_dkv));
    results.push_back(new_gradient(*extra_k, given.need_dkv));
  }
  bool const no_pairs = q.numel() == 0 || (volume(problem.grid_kv) == 0 && problem.extra_len == 0);
  if (no_pairs) {
    for (Tensor& result : results) {
      torch::stable::fill_(result, 0.0);
    }
    return results;
  }
  if (given.need_dq) {
    gradients.q = view(results[0]);
  }
  if (given.need_dkv) {
    gradients.k = view(results[1]);
    gradients.v = view(results[2]);
  }
  if (given.need_dkv && extra_k) {
    gradients.extra_k = view(results[3]);
    gradients.extra_v = view(results[4]);
  }
  problem.gradients = &gradients;

  Launch launch(q);
  if (q.is_cuda() && (given.need_dq || given.need_dkv)) {
    size_t const rows = static_cast<size_t>(q.numel() / q.size(q.dim() - 1));
    gradients.row_terms =
        static_cast<float*>(launch.context().memory->allocate(rows * 4 * sizeof(float)));
    device::fill_row_terms(problem, launch.context());
  }
  for (KernelRow const* kernel : {of_queries, of_keys}) {
    if (kernel != nullptr) {
      kernel->launch(problem, launch.context());
    }
  }
  return results;
}

}  // namespace sparse_fmha
