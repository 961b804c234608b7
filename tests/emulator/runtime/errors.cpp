#include "errors.h"

#include <string>

namespace emulator {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_text;

}  // namespace

cudaError_t fail(cudaError_t error, char const* what) {
  last_error = error;
  last_text = what;
  return error;
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetLastError() {
  cudaError_t const error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

// The text of the thread's last failure: the library prints it right after the failure.
char const* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::last_text.c_str();
}

char const* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOfTheEmulator";
}

}  // extern "C"
