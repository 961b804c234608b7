#include "body.h"

#include "declarations.h"
#include "tokens.h"

namespace emulator::ptx {
namespace {

class Parser {
 public:
  Parser(std::string_view text, size_t at, int32_t line) : cursor_(text, at, line) {}

  Kernel run() {
    if (cursor_.word(true) != ".entry") {
      cursor_.fail("expected .entry");
    }
    kernel_.name = std::string(cursor_.word(false));
    if (cursor_.accept('(')) {
      while (!cursor_.accept(')')) {
        kernel_.parameters.push_back(read_variable(cursor_, cursor_.word(true), false));
        cursor_.accept(',');
      }
    }
    while (cursor_.peek() == '.') {
      read_tuning();
    }
    if (cursor_.peek() != '{') {
      cursor_.fail("expected a body");
    }
    do {
      read_statement();
    } while (!open_.empty());
    resolve_labels();
    return std::move(kernel_);
  }

 private:
  struct Scope {
    int parent;
    std::unordered_map<std::string, int32_t> registers;
    std::unordered_map<std::string, std::pair<int32_t, int32_t>> ranges;  // %r: first, count
    std::unordered_map<std::string, int32_t> labels;
  };

  void read_tuning() {
    bool const threads = cursor_.word(true) == ".maxntid";
    uint64_t product = 1;
    if (std::isdigit(static_cast<unsigned char>(cursor_.peek()))) {
      do {
        product *= read_integer(cursor_);
      } while (cursor_.accept(','));
    }
    if (threads) {
      kernel_.max_threads = static_cast<uint32_t>(product);
    }
  }

  void read_statement() {
    if (cursor_.accept('{')) {
      scopes_.push_back({open_.empty() ? -1 : open_.back(), {}, {}, {}});
      open_.push_back(static_cast<int>(scopes_.size()) - 1);
    } else if (cursor_.accept('}')) {
      open_.pop_back();
    } else if (cursor_.peek() == '.') {
      read_directive();
    } else if (cursor_.at_label()) {
      std::string const name(cursor_.word(false));
      cursor_.expect(':');
      scopes_[open_.back()].labels[name] = static_cast<int32_t>(kernel_.body.size());
    } else if (!cursor_.accept(';')) {
      read_instruction();
    }
  }

  void read_directive() {
    std::string_view const word = cursor_.word(true);
    if (word == ".reg") {
      read_registers();
    } else if (word == ".pragma" || word == ".loc") {
      if (word == ".loc") {
        cursor_.fail("compile without -lineinfo");
      }
      cursor_.skip_past(';');
    } else {
      kernel_.variables.push_back(read_variable(cursor_, word, false));
      cursor_.expect(';');
    }
  }

  void read_registers() {
    bytes_of_type(cursor_.word(true), cursor_);
    do {
      std::string const name(cursor_.word(false));
      Scope& scope = scopes_[open_.back()];
      if (cursor_.accept('<')) {
        auto const count = static_cast<int32_t>(read_integer(cursor_));
        cursor_.expect('>');
        scope.ranges[name] = {kernel_.registers, count};
        kernel_.registers += count;
      } else {
        scope.registers[name] = kernel_.registers++;
      }
    } while (cursor_.accept(','));
    cursor_.expect(';');
  }

  // The index of a register; -1 if the name is none.
  int32_t find_register(std::string const& name) {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) {
      --digits;
    }
    std::string const prefix = name.substr(0, digits);
    for (int scope = open_.back(); scope >= 0; scope = scopes_[scope].parent) {
      auto const single = scopes_[scope].registers.find(name);
      if (single != scopes_[scope].registers.end()) {
        return single->second;
      }
      auto const range = scopes_[scope].ranges.find(prefix);
      if (range != scopes_[scope].ranges.end() && digits < name.size()) {
        int32_t const number = std::stoi(name.substr(digits));
        if (number < range->second.second) {
          return range->second.first + number;
        }
      }
    }
    return -1;
  }

  int32_t special_register(std::string const& name) {
    for (auto const& [known, index] : kernel_.specials) {
      if (known == name) {
        return index;
      }
    }
    kernel_.specials.emplace_back(name, kernel_.registers);
    return kernel_.registers++;
  }

  void read_instruction() {
    Statement statement;
    statement.line = cursor_.line();
    if (cursor_.accept('@')) {
      statement.guard_negated = cursor_.accept('!');
      std::string const name(cursor_.word(false));
      statement.guard = find_register(name);
      if (statement.guard < 0) {
        cursor_.fail("unknown predicate " + name);
      }
    }
    std::string_view const opcode = cursor_.word(true);
    for (size_t begin = 0; begin <= opcode.size();) {
      size_t const end = std::min(opcode.find('.', begin), opcode.size());
      statement.opcode.emplace_back(opcode.substr(begin, end - begin));
      begin = end + 1;
    }
    while (!cursor_.accept(';')) {
      statement.operands.push_back(read_operand());
      if (!cursor_.accept(',') && cursor_.peek() != ';') {
        cursor_.fail("expected ',' or ';'");
      }
    }
    if (statement.opcode[0] == "bra") {
      branches_.emplace_back(kernel_.body.size(), open_.back());
    }
    kernel_.body.push_back(std::move(statement));
  }

  Operand read_operand() {
    Operand result;
    if (cursor_.accept('{')) {
      result.kind = Operand::Kind::kVector;
      while (!cursor_.accept('}')) {
        result.elements.push_back(read_operand());
        cursor_.accept(',');
      }
      return result;
    }
    if (cursor_.accept('[')) {
      result = read_operand();
      if (result.kind == Operand::Kind::kImmediate) {
        result.reg = -1;
      } else {
        result.value = 0;
      }
      result.kind = Operand::Kind::kAddress;
      if (cursor_.accept('+')) {
        result.value += read_integer(cursor_);
      }
      if (cursor_.accept(',')) {
        result.elements.push_back(read_operand());
      }
      cursor_.expect(']');
      return result;
    }
    char const c = cursor_.peek();
    if (c == '-' || std::isdigit(static_cast<unsigned char>(c))) {
      result.kind = Operand::Kind::kImmediate;
      result.value = read_integer(cursor_);
      return result;
    }
    result.negated = cursor_.accept('!');
    std::string name(cursor_.word(true));
    if (name == "_") {
      if (cursor_.accept('|')) {
        result.second = find_register(std::string(cursor_.word(false)));
      }
      return result;
    }
    result.reg = find_register(name);
    if (result.reg < 0 && name[0] == '%') {
      result.reg = special_register(name);
    }
    if (result.reg < 0) {
      result.kind = Operand::Kind::kSymbol;
      result.symbol = name;
      return result;
    }
    result.kind = Operand::Kind::kRegister;
    if (cursor_.accept('|')) {
      result.second = find_register(std::string(cursor_.word(false)));
    }
    return result;
  }

  void resolve_labels() {
    for (auto const& [index, from] : branches_) {
      Statement& statement = kernel_.body[index];
      std::string const& name = statement.operands.at(0).symbol;
      for (int scope = from; scope >= 0 && statement.target < 0; scope = scopes_[scope].parent) {
        auto const found = scopes_[scope].labels.find(name);
        if (found != scopes_[scope].labels.end()) {
          statement.target = found->second;
        }
      }
      if (statement.target < 0) {
        throw std::runtime_error("PTX line " + std::to_string(statement.line) + ": unknown label " +
                                 name);
      }
    }
  }

  Cursor cursor_;
  Kernel kernel_;
  std::vector<Scope> scopes_;
  std::vector<int> open_;
  std::vector<std::pair<size_t, int>> branches_;  // a statement, and the scope it is in
};

}  // namespace

Kernel parse_kernel(std::string_view text, size_t at, int32_t line) {
  return Parser(text, at, line).run();
}

}  // namespace emulator::ptx
