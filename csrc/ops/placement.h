// Where a call runs: the one place that asks torch for a tensor's device and for a CUDA stream.
// tests/emulator has other definitions, by which CPU tensors run on the emulated GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace sparse_fmha {

// Whether kernels for the CPU, or for GPUs, take the tensor. Other devices are neither.
bool on_cpu(torch::stable::Tensor const& tensor);
bool on_gpu(torch::stable::Tensor const& tensor);

// The index of a GPU tensor's device.
int32_t gpu_of(torch::stable::Tensor const& tensor);

// PyTorch's current stream of a GPU tensor's device, a cudaStream_t. Throws if no CUDA build of
// torch is loaded.
void* current_stream(torch::stable::Tensor const& tensor);

// Makes a GPU tensor's device current in this thread, for torch and for the driver, and restores
// torch's device at the end. Torch's guard alone is not enough: it skips the call that makes the
// context current if the device is already torch's current one.
class DeviceScope {
 public:
  explicit DeviceScope(torch::stable::Tensor const& tensor);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace sparse_fmha
