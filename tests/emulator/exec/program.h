// A module's variables and the decoded kernels.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../ptx/module.h"
#include "instruction.h"

namespace emulator {

// Memory at a multiple of 1024 bytes.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::vector<std::byte> storage_;
  std::byte* data_;
  size_t size_;
};

// A kernel, ready to run.
struct Code {
  std::string name;
  std::vector<Instruction> instructions;
  std::vector<std::string> opcodes;  // one per instruction, for messages
  int32_t registers = 0;
  bool has_products = false;                            // of wgmma
  std::vector<std::pair<int32_t, uint64_t>> constants;  // registers with a value from the start
  std::vector<std::pair<int32_t, uint64_t>> locals;     // registers with an address in local memory
  std::vector<std::pair<std::string, int32_t>> specials;
  KernelAttributes attributes;
  std::vector<uint32_t> parameter_offsets;
  std::unique_ptr<Buffer> parameters;
  uint32_t dynamic_shared = 0;  // the address at which it starts
};

class Program {
 public:
  explicit Program(std::string text);

  ptx::Text const& text() const { return text_; }
  Code const& code(std::string const& kernel);
  std::pair<void*, size_t> variable(std::string const& name) const;

 private:
  std::unique_ptr<Code> decode(std::string const& kernel) const;

  ptx::Text text_;
  std::map<std::string, std::unique_ptr<Buffer>> variables_;
  std::map<std::string, std::unique_ptr<Code>> codes_;
};

}  // namespace emulator
