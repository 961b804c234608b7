// The errors of runtime calls, and the texts of the last one.
#pragma once

#include <cuda_runtime_api.h>

#include <exception>

namespace emulator {

// Keeps an error, and what the caller should read about it, for this thread.
cudaError_t fail(cudaError_t error, char const* what);

// Runs the body of a runtime call; what it throws becomes the error.
template <class Body>
cudaError_t guarded(cudaError_t error, Body const& body) {
  try {
    body();
    return cudaSuccess;
  } catch (std::exception const& thrown) {
    return fail(error, thrown.what());
  }
}

}  // namespace emulator
