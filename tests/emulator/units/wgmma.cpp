#include "wgmma.h"

#include <array>
#include <cstring>
#include <vector>

namespace emulator {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kWarpRows = 16;
constexpr int kMostColumns = 256;
constexpr int kDepth = 16;
constexpr uint32_t kChunk = 16;    // bytes
constexpr int kChunkElements = 8;  // of 16 bits

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float half_to_float(uint16_t bits) {
  uint32_t const sign = uint32_t{bits & 0x8000u} << 16;
  uint32_t const exponent = bits >> 10 & 0x1f;
  uint32_t const fraction = bits & 0x3ff;
  if (exponent == 0) {  // a multiple of the least subnormal number
    float const value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  uint32_t const widened = exponent == 31 ? 0xff : exponent + 112;
  return as_float(sign | widened << 23 | fraction << 13);
}

float element_value(Element element, uint16_t bits) {
  return element == Element::kBFloat16 ? as_float(uint32_t{bits} << 16) : half_to_float(bits);
}

// One operand of a warp's product, as [kDepth][rows].
class Operand {
 public:
  explicit Operand(int rows) : rows_(rows), values_(static_cast<size_t>(rows) * kDepth) {}
  float& at(int mn, int k) { return values_[static_cast<size_t>(k) * rows_ + mn]; }
  float const* column(int k) const { return values_.data() + static_cast<size_t>(k) * rows_; }

 private:
  int rows_;
  std::vector<float> values_;
};

// Reads `rows` rows from `first` on, by chunks of 16 bytes: eight values of k, or of mn.
Operand read_shared(Wgmma const& op, SharedMemory shared, uint64_t bits, Major major, int first,
                    int rows, int sign) {
  MatrixDescriptor const matrix = read_descriptor(bits);
  Operand operand(rows);
  int const step_mn = major == Major::kK ? 1 : kChunkElements;
  int const step_k = major == Major::kK ? kChunkElements : 1;
  for (int mn = 0; mn < rows; mn += step_mn) {
    for (int k = 0; k < kDepth; k += step_k) {
      uint16_t chunk[kChunkElements];
      uint32_t const address = element_address(matrix, major, first + mn, k);
      std::memcpy(chunk, shared.at(address, kChunk), kChunk);
      for (int i = 0; i < kChunkElements; ++i) {
        operand.at(mn + (step_mn > 1 ? i : 0), k + (step_k > 1 ? i : 0)) =
            static_cast<float>(sign) * element_value(op.element, chunk[i]);
      }
    }
  }
  return operand;
}

Operand read_registers(Wgmma const& op, uint32_t const* a) {
  Operand operand(kWarpRows);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        Place const place = a_register_place(lane, i, half);
        uint16_t const value = static_cast<uint16_t>(a[lane * 4 + i] >> 16 * half);
        operand.at(place.row, place.column) =
            static_cast<float>(op.sign_a) * element_value(op.element, value);
      }
    }
  }
  return operand;
}

// Products of 16-bit numbers are exact in float32. Sums are rounded here; the hardware cuts off low
// bits instead.
void multiply(Wgmma const& op, Operand const& a, Operand const& b, float* d) {
  int const held = op.n / 2;
  float sums[kWarpRows][kMostColumns];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int i = 0; i < held; ++i) {
      Place const place = accumulator_place(lane, i);
      sums[place.row][place.column] = op.accumulates ? d[lane * held + i] : 0.f;
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    float const* const column = b.column(k);
    for (int row = 0; row < kWarpRows; ++row) {
      float const factor = a.column(k)[row];
      for (int n = 0; n < op.n; ++n) {
        sums[row][n] += factor * column[n];
      }
    }
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int i = 0; i < held; ++i) {
      Place const place = accumulator_place(lane, i);
      d[lane * held + i] = sums[place.row][place.column];
    }
  }
}

void check(Wgmma const& op) {
  if (op.n < 8 || op.n > 256 || op.n % 8 != 0) {
    throw Fault("wgmma: n must be a multiple of 8 from 8 to 256");
  }
}

}  // namespace

MatrixDescriptor read_descriptor(uint64_t bits) {
  auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) * 16; };
  if ((bits >> 49 & 7) != 0) {
    throw Fault("wgmma: a base offset other than 0 is not emulated");
  }
  constexpr std::array<Swizzle, 4> kSwizzles = {Swizzle::kNone, Swizzle::k128, Swizzle::k64,
                                                Swizzle::k32};
  return {field(0), field(16), field(32), kSwizzles[bits >> 62]};
}

uint32_t element_address(MatrixDescriptor const& matrix, Major major, int mn, int k) {
  bool const plain = matrix.swizzle == Swizzle::kNone;
  uint32_t const span = swizzle_span(matrix.swizzle);
  uint32_t offset = 0;
  if (major == Major::kK) {  // rows of 16-byte chunks along k, in groups of 8
    uint32_t const chunk = k / kChunkElements;
    offset = mn % 8 * span + mn / 8 * matrix.stride + chunk * (plain ? matrix.leading : kChunk) +
             k % kChunkElements * 2;
  } else {  // rows of chunks along mn, in groups of 8 values of k
    uint32_t const chunk = mn / kChunkElements;
    uint32_t const chunks = span / kChunk;
    uint32_t const next_chunks = plain ? matrix.stride : matrix.leading;
    uint32_t const next_ks = plain ? matrix.leading : matrix.stride;
    offset = chunk % chunks * kChunk + chunk / chunks * next_chunks + k % 8 * span +
             k / 8 * next_ks + mn % kChunkElements * 2;
  }
  return swizzled(matrix.swizzle, matrix.start + offset);
}

Place accumulator_place(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

Place a_register_place(int thread, int i, int half) {
  return {thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, i / 2 * 8 + thread % 4 * 2 + half};
}

void wgmma(Wgmma const& op, int warp, SharedMemory shared, uint64_t a, uint64_t b, float* d) {
  check(op);
  multiply(op, read_shared(op, shared, a, op.major_a, warp * kWarpRows, kWarpRows, op.sign_a),
           read_shared(op, shared, b, op.major_b, 0, op.n, op.sign_b), d);
}

void wgmma(Wgmma const& op, int, SharedMemory shared, uint32_t const* a, uint64_t b, float* d) {
  check(op);
  multiply(op, read_registers(op, a), read_shared(op, shared, b, op.major_b, 0, op.n, op.sign_b),
           d);
}

void wgmma(Wgmma const& op, SharedMemory shared, uint64_t a, uint64_t b, float* d) {
  for (int warp = 0; warp < 4; ++warp) {
    wgmma(op, warp, shared, a, b, d + warp * kWarpThreads * op.n / 2);
  }
}

void wgmma(Wgmma const& op, SharedMemory shared, uint32_t const* a, uint64_t b, float* d) {
  for (int warp = 0; warp < 4; ++warp) {
    wgmma(op, warp, shared, a + warp * kWarpThreads * 4, b, d + warp * kWarpThreads * op.n / 2);
  }
}

}  // namespace emulator
