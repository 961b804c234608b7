// The device of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sparse_fmha/cuda/current_device.h"

namespace sparse_fmha {

// While it lives, a CUDA tensor's device is current in this thread, for torch and for the driver;
// torch's own choice comes back at its end. Torch's guard alone is not enough: it leaves out the
// call that makes the context current where the device is torch's current one already.
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
