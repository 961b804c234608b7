// Runs a described problem.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha {

// The architecture whose kernels handle tensors on q's device. Throws if this build has none.
Arch arch_of(Tensor const& q);

// What a problem on q's device asks of the registry.
KernelKey key_of(FmhaProblem const& problem, Tensor const& q, Pass pass);

// The registry's kernel for a problem on q's device. Throws if there is none.
KernelRow const& kernel_for(FmhaProblem const& problem, Tensor const& q, Pass pass);

// The thresholds of the batch entries, checked.
float const* checked_threshold(Tensor const& threshold, Tensor const& q);

// PyTorch's own thread pool.
ParallelFor const& torch_threads();

// Where the kernels of a call run: on q's current stream, or on PyTorch's threads. Memory comes
// from PyTorch's allocator, which reuses it only for later work of the stream once this object is
// destroyed.
class Launch : private DeviceMemory {
 public:
  explicit Launch(Tensor const& q);
  Launch(Launch const&) = delete;
  ExecutionContext const& context() const { return context_; }

 private:
  void* allocate(size_t bytes) override;

  Tensor const& like_;
  std::vector<Tensor> tensors_;
  ExecutionContext context_;
};

std::vector<int64_t> sizes_of(Tensor const& t);

// Those of out and of its gradient: q's, with the head dim of v.
std::vector<int64_t> sizes_of_out(FmhaProblem const& problem, Tensor const& q);

Tensor new_tensor(Tensor const& like, std::vector<int64_t> const& sizes,
                  torch::headeronly::ScalarType dtype);

// Allocates out, like q with v's head dim, and lse [B, *L, Hq] fp32, runs the registry's kernel for
// the problem on q's device and its current stream, and returns both. With thresholds, fp32 [B] on
// q's device, key tiles below them are skipped, and the third result is int64 [B, Hq, 2]: the tiles
// that groups of 64 query rows visited, and those that they skipped. save_skipped: a fourth one, of
// calls with thresholds, is what the backward pass needs (skipped_tiles.h).
std::vector<Tensor> run(FmhaProblem& problem, Tensor const& q,
                        std::optional<Tensor> const& skip_threshold, bool save_skipped = false);

// Runs a forward kernel of the problem, whose out is set, on q's device, which is current. Without
// rows nothing runs, and without keys the results are filled in.
void launch_into(KernelRow const& kernel, FmhaProblem& problem, Tensor const& q, Tensor const& out,
                 Tensor const& lse);

// Runs the problem's kernel and writes to out, like q with v's head dim, and lse [B, *L, Hq] fp32,
// both contiguous.
void run_into(FmhaProblem& problem, Tensor const& q, Tensor const& out, Tensor const& lse);

}  // namespace sparse_fmha
