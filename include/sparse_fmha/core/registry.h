// The registry: the table of compiled kernels, and a lookup that finds a row or throws and lists
// them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

// kBackwardDq: the gradient of q; kBackwardDkv: the gradients of k, v and the extra tokens;
// kBackwardFused: all of them in one kernel, with sums of q's in an order that varies.
enum class Pass : int32_t { kForward, kBackwardDq, kBackwardDkv, kBackwardFused, kDecode };

struct KernelKey {
  Arch arch;
  Pass pass;
  DataType dtype;
  int32_t head_dim;   // of q and k: the largest of the row; a request takes the smallest that fits
  int32_t value_dim;  // of v and out, the same
  int32_t mechanism;  // index in Sparsity
  bool skips;         // whether key tiles are skipped by a threshold
  // Whether keys may have a bias and scores a soft cap; in rows see serves() of registry.cpp.
  bool key_bias = false;
  bool packed = false;   // sequences share one dimension of tokens
  bool dilated = false;  // boxes of dilation classes (planning/class_boxes.h)
};

// Runs body(begin, end) over [0, n) on the caller's threads.
struct ParallelFor {
  virtual ~ParallelFor() = default;
  virtual int num_threads() const = 0;
  virtual void run(int64_t n, void (*body)(void* arg, int64_t begin, int64_t end),
                   void* arg) const = 0;
};

// Device memory, aligned to 16 bytes, that lives until the launched work is done.
struct DeviceMemory {
  virtual ~DeviceMemory() = default;
  virtual void* allocate(size_t bytes) = 0;
};

struct ExecutionContext {
  void* stream = nullptr;                 // cudaStream_t; unused on the CPU
  DeviceMemory* memory = nullptr;         // unused by kernels on the CPU
  ParallelFor const* parallel = nullptr;  // CPU only
};

// Printable description of one compiled kernel.
struct KernelInfo {
  KernelKey key;
  std::string name;       // sm90_dense_bfloat16_d128, the row's name from tools/kernel_list.py
  std::string mechanism;  // Dense::kName
  int tile_q = 0;         // 0 if it is a run-time value
  int tile_k = 0;
  int stages = 0;
  int blocks = 1;  // thread blocks on a multiprocessor at a time
  int threads = 0;
  int smem_bytes = 0;
};

struct KernelRow {
  KernelInfo info;
  void (*launch)(FmhaProblem const&, ExecutionContext const&);  // throws std::runtime_error
};

std::vector<KernelRow> const& kernel_table();

// Whether the table has kernels for an architecture.
bool is_built(Arch arch);

// The row with the smallest head dim that fits, among these with the smallest for values. Where
// several have both, that with the given tile_q, else the first one of the list, which is for much
// work (planning/choose_row.h). Throws an error that names the request and the available rows:
// not_implemented (errors.h) if the CPU has a row for the request of a GPU.
KernelRow const& find_kernel(KernelKey const& request, int32_t tile_q = 0);

// Fills `gradients->row_terms` of a problem, which all backward kernels of a call read.
void fill_row_terms(Arch arch, FmhaProblem const& problem, ExecutionContext const& context);

// The same, or nullptr if there is none.
KernelRow const* look_for_kernel(KernelKey const& request, int32_t tile_q = 0);

std::string to_string(KernelKey const& key);
char const* to_string(DataType);
char const* to_string(Pass);

}  // namespace sparse_fmha
