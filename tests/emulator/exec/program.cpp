#include "program.h"

#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "warp.h"

namespace emulator {
namespace {

template <class T>
T aligned(T value, T to) {
  return (value + to - 1) / to * to;
}

}  // namespace

Buffer::Buffer(size_t bytes) : storage_(bytes + 1024), size_(bytes) {
  auto const start = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (aligned<uintptr_t>(start, 1024) - start);
}

Program::Program(std::string text) : text_(std::move(text)) {
  for (ptx::Variable const& variable : text_.variables()) {
    if (variable.space == ptx::Variable::Space::kShared) {
      continue;
    }
    auto buffer = std::make_unique<Buffer>(variable.bytes);
    std::memset(buffer->data(), 0, variable.bytes);
    std::copy_n(reinterpret_cast<std::byte const*>(variable.values.data()), variable.values.size(),
                buffer->data());
    variables_.emplace(variable.name, std::move(buffer));
  }
}

std::pair<void*, size_t> Program::variable(std::string const& name) const {
  auto const found = variables_.find(name);
  if (found == variables_.end()) {
    return {nullptr, 0};
  }
  return {found->second->data(), found->second->size()};
}

Code const& Program::code(std::string const& kernel) {
  std::unique_ptr<Code>& code = codes_[kernel];
  if (code == nullptr) {
    code = decode(kernel);
  }
  return *code;
}

std::unique_ptr<Code> Program::decode(std::string const& name) const {
  ptx::Kernel const kernel = text_.parse(name);
  auto code = std::make_unique<Code>();
  code->name = name;
  code->attributes.max_threads = kernel.max_threads;
  Symbols symbols{{"WARP_SZ", {kLanes, false}}};

  uint32_t bytes = 0;
  for (ptx::Variable const& parameter : kernel.parameters) {
    bytes = aligned(bytes, parameter.align);
    code->parameter_offsets.push_back(bytes);
    code->attributes.parameters.push_back(static_cast<uint32_t>(parameter.bytes));
    bytes += static_cast<uint32_t>(parameter.bytes);
  }
  code->parameters = std::make_unique<Buffer>(bytes);
  for (size_t k = 0; k < kernel.parameters.size(); ++k) {
    symbols[kernel.parameters[k].name] = {
        reinterpret_cast<uint64_t>(code->parameters->data()) + code->parameter_offsets[k], false};
  }
  for (auto const& [variable, buffer] : variables_) {
    symbols[variable] = {reinterpret_cast<uint64_t>(buffer->data()), false};
  }

  // Shared memory: the variables of the kernel, those of the module, then what the launch gives.
  std::vector<ptx::Variable> shared = kernel.variables;
  shared.insert(shared.end(), text_.variables().begin(), text_.variables().end());
  uint32_t end = kReservedShared;
  for (ptx::Variable const& variable : shared) {
    if (variable.space == ptx::Variable::Space::kShared && !variable.dynamic) {
      end = aligned(end, variable.align);
      symbols[variable.name] = {end, false};
      end += static_cast<uint32_t>(variable.bytes);
    }
  }
  code->attributes.static_shared = end - kReservedShared;
  uint32_t align = 16;
  for (ptx::Variable const& variable : shared) {
    align = variable.dynamic ? std::max(align, variable.align) : align;
  }
  code->dynamic_shared = aligned(end, align);
  for (ptx::Variable const& variable : shared) {
    if (variable.dynamic) {
      symbols[variable.name] = {code->dynamic_shared, false};
    } else if (variable.space == ptx::Variable::Space::kLocal) {
      code->attributes.local = aligned(code->attributes.local, variable.align);
      symbols[variable.name] = {code->attributes.local, true};
      code->attributes.local += static_cast<uint32_t>(variable.bytes);
    }
  }
  code->attributes.local = aligned(code->attributes.local, 64u);

  Decoder decoder(kernel, symbols);
  code->instructions = decoder.run();
  for (ptx::Statement const& statement : kernel.body) {
    code->opcodes.push_back(join(statement.opcode));
  }
  code->opcodes.push_back("the end");
  for (Instruction const& instruction : code->instructions) {
    code->has_products |= instruction.writes_late;
  }
  code->constants = decoder.constants();
  code->locals = decoder.locals();
  code->specials = kernel.specials;
  code->registers = decoder.registers();
  return code;
}

}  // namespace emulator
