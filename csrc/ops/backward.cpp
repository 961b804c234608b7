#include "backward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "placement.h"
#include "run.h"
#include "skipped_tiles.h"
#include "sparse_fmha/cpu/kernel_rows.h"
#include "sparse_fmha/device/gathered_keys.h"
#include "sparse_fmha/device/kept_tiles.h"
#include "sparse_fmha/device/kept_windows.h"
#include "sparse_fmha/planning/backward_route.h"

namespace sparse_fmha {

using torch::headeronly::ScalarType;

TensorView like_out(char const* name, Tensor& t, FmhaProblem const& problem, Tensor const& q,
                    bool contiguous) {
  bool const as_values = problem.value_dim != problem.head_dim;
  require(sizes_of(t) == sizes_of_out(problem, q), name, " must have q's shape",
          as_values ? " with v's head dim, " : ", ",
          as_values ? std::to_string(problem.value_dim) + ", of " : "", shape_of(q), ", got ",
          shape_of(t));
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
  require(same, name, " must have q's shape without the head dim, of ", shape_of(q), ", got ",
          shape_of(t));
  require(t.scalar_type() == ScalarType::Float, name, " must have dtype float32, got ",
          torch::headeronly::toString(t.scalar_type()));
  require(on_one_device(t, q), name, " must be on q's device, ", device_of(q), ", got ",
          device_of(t));
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

// One kernel for all gradients where there is one, its order of sums may vary and nothing is
// against it, else one for q and one for k and v.
std::vector<KernelRow const*> backward_kernels(FmhaProblem const& problem, Tensor const& q,
                                               bool need_dq, bool need_dkv, bool deterministic,
                                               char const* against_one) {
  if (need_dq && need_dkv && !deterministic && against_one == nullptr) {
    if (KernelRow const* const row = look_for_kernel(key_of(problem, q, Pass::kBackwardFused))) {
      return {row};
    }
  }
  std::vector<KernelRow const*> rows;
  if (need_dq) {
    rows.push_back(&kernel_for(problem, q, Pass::kBackwardDq));
  }
  if (need_dkv) {
    rows.push_back(&kernel_for(problem, q, Pass::kBackwardDkv));
  }
  return rows;
}

bool has_pass(std::vector<KernelRow const*> const& rows, Pass pass) {
  return std::any_of(rows.begin(), rows.end(),
                     [pass](KernelRow const* row) { return row->info.key.pass == pass; });
}

// Of stripes, part by part: memory of one is free for the next, which runs after it.
template <class KernelsOf>
void run_gathered(FmhaProblem const& problem, Tensor const& q, KernelsOf const& kernels_of) {
  Launch of_lists(q);
  device::ListedKeys const keys = device::list_keys(problem, of_lists.context());
  GatheredParts const parts(problem);
  for (int32_t i = 0; i < parts.count(); ++i) {
    Launch launch(q);
    ExecutionContext const& context = launch.context();
    auto gathered = device::gather_keys(problem, keys, parts[i], context);
    gathered.problem.gradients = &gathered.gradients;
    for (KernelRow const* const kernel :
         kernels_of(gathered.problem, why_two_kernels(gathered.problem))) {
      kernel->launch(gathered.problem, context);
    }
    device::return_queries(problem, parts[i], gathered, context);
    device::add_gathered(problem, keys, parts[i], gathered, context);
  }
}

}  // namespace

std::vector<Tensor> run_backward(FmhaProblem& problem, Tensor const& q, Tensor const& k,
                                 Tensor const& v, std::optional<Tensor> const& extra_k,
                                 std::optional<Tensor> const& extra_v, BackwardArguments given) {
  if (given.skip_threshold) {
    problem.skip_threshold = checked_threshold(*given.skip_threshold, q);
  }
  bool const has_bias = problem.key_bias.data != nullptr;
  bool const need_dbias = has_bias && given.need_dbias;
  bool const no_pairs = q.numel() == 0 || (volume(problem.grid_kv) == 0 && problem.extra_len == 0);
  Arch const arch = arch_of(q);  // says what this build lacks before the device is used
  DeviceScope const scope(q);
  Launch launch(q);
  if (no_pairs && !on_cpu(q)) {
    problem.skip_threshold = nullptr;
  }
  bool const skips = problem.skip_threshold != nullptr && !on_cpu(q);
  bool const skips_windows =
      skips && std::holds_alternative<Neighborhood::Params>(problem.sparsity);
  if (skips && !skips_windows) {
    show_kept_tiles(problem, q, given.skipped, launch);
  }
  auto kernels_of = [&](FmhaProblem const& p, char const* against_one) {
    return backward_kernels(p, q, given.need_dq, given.need_dkv || need_dbias, given.deterministic,
                            against_one);
  };
  bool const gathers =
      arch == Arch::kSm90 && (given.need_dkv || need_dbias) && why_not_gathered(problem) == nullptr;
  std::vector<KernelRow const*> const kernels = skips_windows || gathers
                                                    ? std::vector<KernelRow const*>()
                                                    : kernels_of(problem, why_two_kernels(problem));
  if (problem.kept_blocks != nullptr && has_pass(kernels, Pass::kBackwardDq)) {
    device::list_kept_blocks(problem, launch.context());
  }
  Gradients gradients;
  gradients.out = like_out("dout", given.dout, problem, q, /*contiguous=*/false);
  problem.out = like_out("out", given.out, problem, q, /*contiguous=*/true);
  // Kernels only read it in this pass.
  problem.lse = const_cast<float*>(rows_of_q("lse", given.lse, q));
  gradients.lse = given.dlse ? rows_of_q("dlse", *given.dlse, q) : nullptr;

  std::vector<Tensor> results = {new_gradient(q, given.need_dq), new_gradient(k, given.need_dkv),
                                 new_gradient(v, given.need_dkv)};
  if (extra_k) {
    results.push_back(new_gradient(*extra_k, given.need_dkv));
    results.push_back(new_gradient(*extra_v, given.need_dkv));
  }
  if (has_bias) {
    std::vector<int64_t> const wanted = {problem.batch, problem.heads_q, volume(problem.grid_kv)};
    std::vector<int64_t> const sizes = need_dbias ? wanted : std::vector<int64_t>{q.size(0), 0};
    results.push_back(new_tensor(q, sizes, ScalarType::Float));
  }
  if (no_pairs) {
    for (Tensor& result : results) {
      torch::stable::fill_(result, 0.0);
    }
    return results;
  }
  std::vector<Tensor> unwanted;
  if (given.need_dq) {
    gradients.q = view(results[0]);
  }
  if (given.need_dkv) {
    gradients.k = view(results[1]);
    gradients.v = view(results[2]);
  } else if (need_dbias && !on_cpu(q)) {  // GPU kernels store all that they compute
    unwanted = {new_gradient(k, true), new_gradient(v, true)};
    gradients.k = view(unwanted[0]);
    gradients.v = view(unwanted[1]);
  }
  if (given.need_dkv && extra_k) {
    gradients.extra_k = view(results[3]);
    gradients.extra_v = view(results[4]);
  }
  if (need_dbias) {
    gradients.key_bias = static_cast<float*>(results.back().data_ptr());
    if (!on_cpu(q)) {  // GPU kernels leave out the heads in which no query sees a key tile
      torch::stable::fill_(results.back(), 0.0);
    }
  }
  problem.gradients = &gradients;

  if (!kernels.empty() || skips_windows || gathers) {
    size_t const rows = static_cast<size_t>(q.numel() / q.size(q.dim() - 1));
    gradients.row_terms =
        static_cast<float*>(launch.context().memory->allocate(rows * 4 * sizeof(float)));
    if (problem.skip_threshold != nullptr && !skips) {  // a GPU lists what was kept
      gradients.skipped_tiles = cpu_skipped_tiles(problem, launch.context());
    }
    fill_row_terms(arch, problem, launch.context());
  }
  for (KernelRow const* const kernel : kernels) {
    kernel->launch(problem, launch.context());
  }
  if (gathers) {
    run_gathered(problem, q, kernels_of);
  }
  if (skips_windows) {
    auto windows = kept_windows(problem, q, given.skipped, launch);
    windows.problem.gradients = &windows.gradients;
    for (KernelRow const* const kernel :
         kernels_of(windows.problem, why_two_kernels_of_kept(windows.problem))) {
      kernel->launch(windows.problem, launch.context());
    }
    device::return_gradients(problem, windows, launch.context());
  }
  return results;
}

}  // namespace sparse_fmha
