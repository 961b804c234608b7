#include "decoder.h"

namespace emulator {

std::string join(std::vector<std::string> const& opcode, size_t first) {
  std::string result;
  for (size_t i = first; i < opcode.size(); ++i) {
    result += (i == first ? "" : ".") + opcode[i];
  }
  return result;
}

bool has_part(ptx::Statement const& statement, char const* part) {
  for (std::string const& each : statement.opcode) {
    if (each == part) {
      return true;
    }
  }
  return false;
}

Decoder::Decoder(ptx::Kernel const& kernel, Symbols const& symbols)
    : kernel_(kernel), symbols_(symbols), registers_(kernel.registers) {
  add_arithmetic(table_);
  add_floats(table_);
  add_conversions(table_);
  add_moves(table_);
  add_control(table_);
  add_memory(table_);
  add_atomics(table_);
  add_lane_exchanges(table_);
  add_barriers(table_);
  add_matrices(table_);
  add_warpgroup_matrices(table_);
  add_bulk_copies(table_);
}

void Decoder::fail(ptx::Statement const& statement, std::string const& what) const {
  throw Error("PTX line " + std::to_string(statement.line) + ", " + join(statement.opcode) + ": " +
              what + " (kernel " + kernel_.name + ")");
}

int32_t Decoder::constant(uint64_t value) {
  auto const [entry, is_new] = by_value_.emplace(value, registers_);
  if (is_new) {
    constants_.emplace_back(registers_++, value);
  }
  return entry->second;
}

int32_t Decoder::reg(ptx::Operand const& operand) {
  switch (operand.kind) {
    case ptx::Operand::Kind::kRegister:
      return operand.reg;
    case ptx::Operand::Kind::kImmediate:
      return constant(operand.value);
    case ptx::Operand::Kind::kSink:
      return sink();
    case ptx::Operand::Kind::kSymbol: {
      auto const found = symbols_.find(operand.symbol);
      if (found == symbols_.end()) {
        throw Error("kernel " + kernel_.name + ": unknown name " + operand.symbol);
      }
      if (found->second.is_local) {
        locals_.emplace_back(registers_++, found->second.address);
        return locals_.back().first;
      }
      return constant(found->second.address);
    }
    default:
      throw Error("kernel " + kernel_.name + ": a register or a constant was expected");
  }
}

void Decoder::append(ptx::Operand const& operand, std::vector<int32_t>& to) {
  if (operand.kind == ptx::Operand::Kind::kVector) {
    for (ptx::Operand const& element : operand.elements) {
      to.push_back(reg(element));
    }
  } else {
    to.push_back(reg(operand));
  }
}

void Decoder::address(ptx::Operand const& operand, Instruction& instruction) {
  if (operand.kind != ptx::Operand::Kind::kAddress) {
    throw Error("kernel " + kernel_.name + ", PTX line " + std::to_string(instruction.line) +
                ": an address was expected");
  }
  ptx::Operand base = operand;
  base.kind = operand.reg >= 0          ? ptx::Operand::Kind::kRegister
              : !operand.symbol.empty() ? ptx::Operand::Kind::kSymbol
                                        : ptx::Operand::Kind::kImmediate;
  if (base.kind != ptx::Operand::Kind::kImmediate) {
    instruction.offset = static_cast<int64_t>(operand.value);
  }
  instruction.at.push_back(reg(base));
}

bool Decoder::is_clock(ptx::Operand const& operand) const {
  for (auto const& [name, index] : kernel_.specials) {
    if (index == operand.reg) {
      return name.rfind("%clock", 0) == 0 || name == "%globaltimer";
    }
  }
  return false;
}

uint64_t Decoder::immediate(ptx::Statement const& statement, size_t operand) const {
  if (operand >= statement.operands.size() ||
      statement.operands[operand].kind != ptx::Operand::Kind::kImmediate) {
    fail(statement, "operand " + std::to_string(operand) + " must be a constant");
  }
  return statement.operands[operand].value;
}

std::vector<Instruction> Decoder::run() {
  std::vector<Instruction> result;
  result.reserve(kernel_.body.size());
  for (ptx::Statement const& statement : kernel_.body) {
    Instruction instruction;
    instruction.guard = statement.guard;
    instruction.guard_negated = statement.guard_negated;
    instruction.target = statement.target;
    instruction.line = statement.line;
    auto const found = table_.find(statement.opcode[0]);
    Decode const decode = is_of_clusters(statement) ? decode_of_clusters
                          : found != table_.end()   ? found->second
                                                    : nullptr;
    if (decode == nullptr || !decode(*this, statement, instruction)) {
      fail(statement, "this instruction is not emulated");
    }
    result.push_back(std::move(instruction));
  }
  // A kernel may end without ret.
  Instruction last;
  table_.at("ret")(*this, {}, last);
  last.line = result.empty() ? 0 : result.back().line;
  result.push_back(last);
  return result;
}

}  // namespace emulator
