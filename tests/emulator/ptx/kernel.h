// The statements of one kernel, with registers as indices and labels as statement indices.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulator::ptx {

struct Operand {
  enum class Kind : uint8_t { kRegister, kImmediate, kSymbol, kAddress, kVector, kSink };
  Kind kind = Kind::kSink;
  bool negated = false;           // !p
  int32_t reg = -1;               // of a register, or of an address's base
  int32_t second = -1;            // q in p|q
  uint64_t value = 0;             // of an immediate, or an address's offset
  std::string symbol;             // a name, or that of an address's base
  std::vector<Operand> elements;  // of a vector, or an address's coordinates
};

struct Statement {
  std::vector<std::string> opcode;  // the parts between dots
  std::vector<Operand> operands;
  int32_t guard = -1;  // a predicate register
  bool guard_negated = false;
  int32_t target = -1;  // of a branch
  int32_t line = 0;     // in the module's text
};

// A variable in .shared, .local, .global, .const or .param.
struct Variable {
  enum class Space : uint8_t { kShared, kLocal, kGlobal, kConst, kParam };
  Space space;
  std::string name;
  uint32_t align = 1;
  uint64_t bytes = 0;
  bool dynamic = false;         // shared memory sized by the launch
  std::vector<uint8_t> values;  // initial ones; the rest is zero
};

struct Kernel {
  std::string name;
  std::vector<Variable> parameters;
  std::vector<Variable> variables;
  uint32_t max_threads = 1024;
  int32_t registers = 0;                                  // indices in use
  std::vector<std::pair<std::string, int32_t>> specials;  // such as %tid.x, and its register
  std::vector<Statement> body;
};

}  // namespace emulator::ptx
