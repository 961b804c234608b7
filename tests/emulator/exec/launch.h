#pragma once
// What a runtime calls: a module made from PTX text, and a launch of one of its kernels.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

// Any fault of a kernel or of its PTX: the text says where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared = 0;  // bytes
  void** arguments = nullptr;   // one pointer per parameter, as cudaLaunchKernel takes them
};

// What cudaFuncGetAttributes reports of a kernel.
struct KernelAttributes {
  uint32_t static_shared = 0;        // bytes
  uint32_t local = 0;                // bytes of a thread
  uint32_t max_threads = 1024;       // of a block; .maxntid
  std::vector<uint32_t> parameters;  // bytes of each
};

class Program;

// One PTX module. Finds the kernels at once; parses and decodes a kernel when it is first used.
class Module {
 public:
  explicit Module(std::string text);
  ~Module();
  Module(Module const&) = delete;
  Module& operator=(Module const&) = delete;

  std::vector<std::string> kernels() const;
  bool has(std::string const& kernel) const;
  KernelAttributes attributes(std::string const& kernel);
  // The host memory of a .global or .const variable, and its bytes; {nullptr, 0} if there is none.
  std::pair<void*, size_t> variable(std::string const& name);

  Program& program() { return *program_; }

 private:
  std::unique_ptr<Program> program_;
};

// Runs the whole grid before it returns. Throws Error.
//   SPARSE_FMHA_EMULATOR_SEED      of the order of warps and the delays of copies; 0 if it is not
//   set SPARSE_FMHA_EMULATOR_RESIDENT  blocks that run together; 0: one cluster at a time (default)
void launch(Module& module, std::string const& kernel, Launch const& launch);

}  // namespace emulator
