// From a kernel's statements to instructions.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "../ptx/kernel.h"
#include "instruction.h"

namespace emulator {

class Decoder;
// Fills in an instruction; returns false if it does not know the opcode's modifiers.
using Decode = bool (*)(Decoder&, ptx::Statement const&, Instruction&);
using DecodeTable = std::unordered_map<std::string, Decode>;  // by the opcode's first part

// One per file of instructions.
void add_arithmetic(DecodeTable& table);
void add_floats(DecodeTable& table);
void add_conversions(DecodeTable& table);
void add_moves(DecodeTable& table);
void add_control(DecodeTable& table);
void add_memory(DecodeTable& table);
void add_atomics(DecodeTable& table);
void add_lane_exchanges(DecodeTable& table);
void add_barriers(DecodeTable& table);
void add_matrices(DecodeTable& table);
void add_warpgroup_matrices(DecodeTable& table);
void add_bulk_copies(DecodeTable& table);

// Instructions of clusters, which have the first part of others.
bool is_of_clusters(ptx::Statement const& statement);
bool decode_of_clusters(Decoder& decoder, ptx::Statement const& statement, Instruction& i);

// The address of a variable as instructions see it; in local memory, the offset.
struct Symbol {
  uint64_t address;
  bool is_local;
};
using Symbols = std::unordered_map<std::string, Symbol>;

class Decoder {
 public:
  Decoder(ptx::Kernel const& kernel, Symbols const& symbols);

  std::vector<Instruction> run();

  // Values that registers hold from a warp's start on.
  std::vector<std::pair<int32_t, uint64_t>> const& constants() const { return constants_; }
  // Registers that hold addresses in local memory, which differ among threads: their offsets.
  std::vector<std::pair<int32_t, uint64_t>> const& locals() const { return locals_; }
  int32_t registers() const { return registers_; }

  // The register of an operand; constants and addresses of variables have registers of their own.
  int32_t reg(ptx::Operand const& operand);
  int32_t constant(uint64_t value);
  // Appends the register of each element of a vector, or of a single operand.
  void append(ptx::Operand const& operand, std::vector<int32_t>& to);
  // Sets the base register (appended) and the offset of an address.
  void address(ptx::Operand const& operand, Instruction& instruction);
  // A register that nothing reads.
  int32_t sink() { return registers_++; }

  // Whether an operand is %clock or another register that changes by itself.
  bool is_clock(ptx::Operand const& operand) const;

  [[noreturn]] void fail(ptx::Statement const& statement, std::string const& what) const;
  // The operand's value if it is a constant.
  uint64_t immediate(ptx::Statement const& statement, size_t operand) const;

 private:
  ptx::Kernel const& kernel_;
  Symbols const& symbols_;
  DecodeTable table_;
  int32_t registers_;
  std::map<uint64_t, int32_t> by_value_;
  std::vector<std::pair<int32_t, uint64_t>> constants_;
  std::vector<std::pair<int32_t, uint64_t>> locals_;
};

// "add.s32" of the parts.
std::string join(std::vector<std::string> const& opcode, size_t first = 0);
bool has_part(ptx::Statement const& statement, char const* part);

}  // namespace emulator
