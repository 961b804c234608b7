#include "stream.h"

#include <dlfcn.h>

#include "check.h"

namespace sparse_fmha {
namespace {

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

void* current_cuda_stream(int32_t device) {
  static CurrentStream const current_stream = look_up();
  void* stream = nullptr;
  require(current_stream(device, &stream) == 0, "PyTorch has no current stream for cuda:", device);
  return stream;
}

}  // namespace sparse_fmha
