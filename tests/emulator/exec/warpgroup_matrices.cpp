// wgmma. Each warp computes its 16 rows of the warpgroup's 64, when it waits for them: what a
// kernel does too early to shared memory, or reads too early from registers, shows.
#include "../units/wgmma.h"

#include <algorithm>

#include "decoder.h"
#include "values.h"

namespace emulator {
namespace {

struct Shape : Details {
  Wgmma op;
  bool a_in_registers = false;
};

// Checks that the product may see what threads have written to its operands.
void check_order(Warp& warp, uint64_t bits, Major major, int first, int rows) {
  MatrixDescriptor const matrix = read_descriptor(bits);
  constexpr int kDepth = 16, kChunk = 8;
  int const step_mn = major == Major::kK ? 1 : kChunk;
  int const step_k = major == Major::kK ? kChunk : 1;
  for (int mn = first; mn < first + rows; mn += step_mn) {
    for (int k = 0; k < kDepth; k += step_k) {
      uint32_t const address = element_address(matrix, major, mn, k);
      warp.block->shared.at(address, 16);
      warp.block->order.check(address, 16, warp.index * kLanes);
    }
  }
}

// Registers: D (n / 2), A (4 registers or a descriptor), B's descriptor, scale-d.
Outcome multiply(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  if (lanes != kAllLanes) {
    fault("wgmma needs all 32 lanes");
  }
  auto const& shape = static_cast<Shape const&>(*i.details);
  int const count = shape.op.n / 2;
  int const a_registers = shape.a_in_registers ? 4 : 1;
  Wgmma op = shape.op;
  op.accumulates = (warp.reg(i.at[count + a_registers + 1])[0] & 1) != 0;
  uint64_t const b = warp.reg(i.at[count + a_registers])[0];
  uint64_t const a = warp.reg(i.at[count])[0];
  std::vector<uint32_t> fragment;
  if (shape.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int k = 0; k < 4; ++k) {
        fragment.push_back(static_cast<uint32_t>(warp.reg(i.at[count + k])[lane]));
      }
    }
  }
  for (int k = 0; k < count + (shape.a_in_registers ? 4 : 0); ++k) {
    if (warp.accessed[i.at[k]] != 0) {
      fault("uses a register that was accessed after the last wgmma.fence");
    }
  }
  int const slice = static_cast<int>(warp.index % 4);
  if (!shape.a_in_registers) {
    check_order(warp, a, op.major_a, 16 * slice, 16);
  }
  check_order(warp, b, op.major_b, 0, op.n);
  for (int k = 0; k < count; ++k) {
    ++warp.unfinished[i.at[k]];
    ++warp.unfinished_count;
    warp.products.registers.push_back(i.at[k]);
  }
  warp.products.work.push_back([&warp, &i, op, a, b, fragment, count, slice] {
    std::vector<float> d(static_cast<size_t>(kLanes) * count);
    for (int k = 0; k < count; ++k) {
      uint64_t const* const from = warp.reg(i.at[k]);
      for (int lane = 0; lane < kLanes; ++lane) {
        d[lane * count + k] = read<float>(from[lane]);
      }
    }
    if (fragment.empty()) {
      wgmma(op, slice, warp.block->shared, a, b, d.data());
    } else {
      wgmma(op, slice, warp.block->shared, fragment.data(), b, d.data());
    }
    for (int k = 0; k < count; ++k) {
      uint64_t* const to = warp.reg(i.at[k]);
      for (int lane = 0; lane < kLanes; ++lane) {
        to[lane] = write<float>(d[lane * count + k]);
      }
    }
    ++warp.block->grid->progress;
  });
  return Outcome::kNext;
}

bool decode_multiply(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& size = statement.opcode.at(4);  // m64n128k16
  std::string const types = join(statement.opcode, 5);
  if (size.rfind("m64n", 0) != 0 || size.substr(size.size() - 3) != "k16") {
    return false;
  }
  auto shape = std::make_shared<Shape>();
  shape->op.n = std::stoi(size.substr(4));
  if (types == "f32.f16.f16") {
    shape->op.element = Element::kFloat16;
  } else if (types == "f32.bf16.bf16") {
    shape->op.element = Element::kBFloat16;
  } else {
    return false;
  }
  auto const& operands = statement.operands;
  shape->a_in_registers = operands.at(1).kind == ptx::Operand::Kind::kVector;
  decoder.append(operands.at(0), i.at);
  decoder.append(operands.at(1), i.at);
  decoder.append(operands.at(2), i.at);
  decoder.append(operands.at(3), i.at);
  if (operands[3].negated ||
      i.at.size() != static_cast<size_t>(shape->op.n) / 2 + (shape->a_in_registers ? 4 : 1) + 2) {
    return false;
  }
  auto const sign = [&](size_t k) {
    return static_cast<int>(static_cast<int64_t>(decoder.immediate(statement, k)));
  };
  shape->op.sign_a = sign(4);
  shape->op.sign_b = sign(5);
  auto const major = [&](size_t k) {
    return decoder.immediate(statement, k) == 0 ? Major::kK : Major::kMn;
  };
  if (!shape->a_in_registers) {
    shape->op.major_a = major(6);
  }
  shape->op.major_b = major(shape->a_in_registers ? 6 : 7);
  i.details = shape;
  i.run = multiply;
  i.writes_late = true;
  i.count = static_cast<uint32_t>(shape->op.n / 2);
  return true;
}

void run(LateGroup& group) {
  for (auto const& work : group.work) {
    work();
  }
  group.work.clear();
}

Outcome commit(Warp& warp, Instruction const&, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  Grid& grid = *warp.block->grid;
  if (!grid.late && grid.draw(2) == 0) {
    for (LateGroup& before : warp.committed) {
      run(before);
    }
    run(warp.products);
  }
  warp.committed.push_back(std::move(warp.products));
  warp.products = {};
  return Outcome::kNext;
}

// value: the groups that may be pending afterwards.
Outcome wait(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  while (warp.committed.size() > i.value) {
    LateGroup& group = warp.committed.front();
    run(group);
    for (int32_t const reg : group.registers) {
      --warp.unfinished[reg];
      --warp.unfinished_count;
    }
    warp.committed.erase(warp.committed.begin());
  }
  return Outcome::kNext;
}

Outcome fence(Warp& warp, Instruction const&, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  std::fill(warp.accessed.begin(), warp.accessed.end(), uint8_t{0});
  return Outcome::kNext;
}

bool decode(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& what = statement.opcode.at(1);
  if (what == "mma_async") {
    return decode_multiply(decoder, statement, i);
  }
  if (what == "wait_group") {
    i.value = decoder.immediate(statement, 0);
  }
  i.run = what == "wait_group" ? wait : what == "commit_group" ? commit : fence;
  return what == "wait_group" || what == "commit_group" || what == "fence";
}

}  // namespace

void add_warpgroup_matrices(DecodeTable& table) { table["wgmma"] = decode; }

}  // namespace emulator
