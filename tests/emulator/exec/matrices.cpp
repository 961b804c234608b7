// mma.sync, ldmatrix and stmatrix.
#include "addresses.h"

namespace emulator {
namespace {

enum class Number : uint8_t { kHalf, kBFloat };

float decode(Number number, uint16_t bits) {
  return number == Number::kHalf ? to_float(Half{bits}) : to_float(BFloat{bits});
}

// m16n8kK with 16-bit A and B. Registers: D (4), A (K / 4), B (K / 8), C (4). In a register of A, B
// or C, lane 4 g + t holds elements of row or column g and of 2 t and 2 t + 1 in the other
// direction.
template <Number N, int K>
Outcome multiply(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  constexpr int kA = K / 4, kB = K / 8;
  float a[16][K], b[K][8], d[16][8];
  for (int r = 0; r < kA; ++r) {
    uint64_t const* const from = warp.reg(i.at[4 + r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      int const row = lane / 4 + 8 * (r % 2), k = lane % 4 * 2 + 8 * (r / 2);
      a[row][k] = decode(N, static_cast<uint16_t>(from[lane]));
      a[row][k + 1] = decode(N, static_cast<uint16_t>(from[lane] >> 16));
    }
  }
  for (int r = 0; r < kB; ++r) {
    uint64_t const* const from = warp.reg(i.at[4 + kA + r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      int const k = lane % 4 * 2 + 8 * r;
      b[k][lane / 4] = decode(N, static_cast<uint16_t>(from[lane]));
      b[k + 1][lane / 4] = decode(N, static_cast<uint16_t>(from[lane] >> 16));
    }
  }
  auto const place = [](int lane, int r) {
    return lane / 4 * 8 + 64 * (r / 2) + lane % 4 * 2 + r % 2;
  };
  for (int r = 0; r < 4; ++r) {
    uint64_t const* const from = warp.reg(i.at[4 + kA + kB + r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      (&d[0][0])[place(lane, r)] = read<float>(from[lane]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) {
        d[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (int r = 0; r < 4; ++r) {
    uint64_t* const to = warp.reg(i.at[r]);
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = write<float>((&d[0][0])[place(lane, r)]);
    }
  }
  return Outcome::kNext;
}

bool decode_multiply(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const shape = join(statement.opcode, 1);
  if (shape == "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") {
    i.run = multiply<Number::kHalf, 16>;
  } else if (shape == "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") {
    i.run = multiply<Number::kBFloat, 16>;
  } else if (shape == "sync.aligned.m16n8k8.row.col.f32.f16.f16.f32") {
    i.run = multiply<Number::kHalf, 8>;
  } else if (shape == "sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32") {
    i.run = multiply<Number::kBFloat, 8>;
  } else {
    return false;
  }
  for (ptx::Operand const& operand : statement.operands) {
    decoder.append(operand, i.at);
  }
  return true;
}

// Registers: the address, then `count` matrices of 8 x 8 elements of 16 bits. Lane 8 m + r has the
// address of row r of matrix m.
template <bool kTransposed>
Outcome load(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  uint16_t matrix[4][8][8];
  for (uint32_t m = 0; m < i.count; ++m) {
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[m][row],
                  data_at<true>(warp, i, i.at[0], static_cast<int>(8 * m) + row, 16), 16);
    }
  }
  for (uint32_t m = 0; m < i.count; ++m) {
    uint64_t* const to = warp.reg(i.at[1 + m]);
    for (int lane = 0; lane < kLanes; ++lane) {
      int const g = lane / 4, t = 2 * (lane % 4);
      uint32_t const low = kTransposed ? matrix[m][t][g] : matrix[m][g][t];
      uint32_t const high = kTransposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1];
      to[lane] = high << 16 | low;
    }
  }
  return Outcome::kNext;
}

template <bool kTransposed>
Outcome store(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (!all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  uint16_t matrix[4][8][8];
  for (uint32_t m = 0; m < i.count; ++m) {
    uint64_t const* const from = warp.reg(i.at[1 + m]);
    for (int lane = 0; lane < kLanes; ++lane) {
      int const g = lane / 4, t = 2 * (lane % 4);
      (kTransposed ? matrix[m][t][g] : matrix[m][g][t]) = static_cast<uint16_t>(from[lane]);
      (kTransposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1]) =
          static_cast<uint16_t>(from[lane] >> 16);
    }
  }
  for (uint32_t m = 0; m < i.count; ++m) {
    for (int row = 0; row < 8; ++row) {
      int const lane = static_cast<int>(8 * m) + row;
      std::memcpy(data_at<true>(warp, i, i.at[0], lane, 16), matrix[m][row], 16);
      note_write<true>(warp, i, i.at[0], lane, 16);
    }
  }
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

bool decode_matrix_access(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  bool const loads = statement.opcode[0] == "ldmatrix";
  bool const transposed = has_part(statement, "trans");
  i.run = loads ? transposed ? load<true> : load<false> : transposed ? store<true> : store<false>;
  i.count = has_part(statement, "x4") ? 4 : has_part(statement, "x2") ? 2 : 1;
  decoder.address(statement.operands.at(loads ? 1 : 0), i);
  decoder.append(statement.operands.at(loads ? 0 : 1), i.at);
  return has_part(statement, "m8n8") && has_part(statement, "b16") && in_shared(statement) &&
         i.at.size() == 1 + i.count;
}

}  // namespace

void add_matrices(DecodeTable& table) {
  table["mma"] = decode_multiply;
  table["ldmatrix"] = decode_matrix_access;
  table["stmatrix"] = decode_matrix_access;
}

}  // namespace emulator
