// The device of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sparse_fmha/cuda/current_device.h"

namespace sparse_fmha {

// Makes a CUDA tensor's device current in this thread, for torch and for the driver, and restores
// torch's device at the end. Torch's guard alone is not enough: it skips the call that makes the
// context current if the device is already torch's current one.
class DeviceScope {
 public:
  explicit DeviceScope(torch::stable::Tensor const& tensor) {
    if (tensor.is_cuda()) {
      guard_.emplace(tensor.get_device_index());
      make_current(tensor.get_device_index());
    }
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace sparse_fmha
