#include "placement.h"

#include <dlfcn.h>

#include "check.h"
#include "sparse_fmha/cuda/current_device.h"

namespace sparse_fmha {
namespace {

using torch::stable::Tensor;
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Only libtorch_cuda.so has the symbol. A link-time reference, even a weak one, would break this
// library on a CPU build of torch.
CurrentStream look_up() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  require(symbol != nullptr, "q is a CUDA tensor, but libtorch_cuda.so is not loaded");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

bool on_cpu(Tensor const& tensor) { return tensor.is_cpu(); }

bool on_gpu(Tensor const& tensor) { return tensor.is_cuda(); }

int32_t gpu_of(Tensor const& tensor) { return tensor.get_device_index(); }

void* current_stream(Tensor const& tensor) {
  static CurrentStream const stream_of = look_up();
  void* stream = nullptr;
  int32_t const device = gpu_of(tensor);
  require(stream_of(device, &stream) == 0, "PyTorch has no current stream for cuda:", device);
  return stream;
}

DeviceScope::DeviceScope(Tensor const& tensor) {
  if (on_gpu(tensor)) {
    guard_.emplace(gpu_of(tensor));
    make_current(gpu_of(tensor));
  }
}

}  // namespace sparse_fmha
