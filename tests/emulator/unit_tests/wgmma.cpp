// wgmma against CuTe's layouts of fragments and operands, and its descriptors.
#include "../units/wgmma.h"

#include <cstring>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <random>
#include <vector>

#include "check.h"

namespace unit_tests {
namespace {

using namespace cute;
using emulator::Element;
using emulator::SharedMemory;

uint16_t bits_of(bfloat16_t value) { return value.storage; }

template <int kN>
void accumulators_lie_as_in_cute() {
  using Layout = GMMA::CLayout_64xN<kN>;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      emulator::Place const place = emulator::accumulator_place(thread, i);
      CHECK(place.row + 64 * place.column == Layout{}(thread, i));
    }
  }
}

void a_registers_lie_as_in_cute() {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 8; ++i) {
      emulator::Place const place = emulator::a_register_place(thread, i / 2, i % 2);
      CHECK(place.row + 64 * place.column == GMMA::ALayout_64x16{}(thread, i));
    }
  }
}

// A matrix of numbers in shared memory, in one of CuTe's layouts, with a descriptor for each 16
// entries of k.
template <GMMA::Major kMajor, class Atom, int kMn>
struct Matrix {
  static constexpr int kDepth = 64;
  static constexpr uint32_t kStart = 2048;
  using Layout = decltype(tile_to_shape(Atom{}, Shape<Int<kMn>, Int<kDepth>>{}));

  explicit Matrix(unsigned seed) : memory(64 << 10), values(kMn * kDepth) {
    std::mt19937 random(seed);
    for (int k = 0; k < kDepth; ++k) {
      for (int mn = 0; mn < kMn; ++mn) {
        auto const value = bfloat16_t(static_cast<float>(static_cast<int>(random() % 33) - 16) / 8);
        values[mn * kDepth + k] = static_cast<float>(value);
        uint16_t const bits = bits_of(value);
        std::memcpy(memory.data() + kStart + 2 * place(mn, k), &bits, 2);
      }
    }
  }

  // Where CuTe has an entry, in elements; kStart is a multiple of every swizzle's period.
  static int place(int mn, int k) {
    return as_position_independent_swizzle_layout(Layout{})(mn, k);
  }

  // All but the start is CuTe's. It prints an error for the start, for which it needs a GPU.
  uint64_t descriptor(int k) const {
    auto const base = make_smem_ptr(static_cast<bfloat16_t*>(nullptr));
    Tensor const tile =
        local_tile(make_tensor(base, Layout{}), Shape<Int<kMn>, _16>{}, make_coord(0, 0));
    GmmaDescriptor result = GMMA::make_gmma_desc<kMajor>(tile);
    auto const plain = get_nonswizzle_portion(Layout{});
    result.bitfield.start_address_ = (kStart + 2 * plain(0, k * 16)) >> 4;
    return result.desc_;
  }

  SharedMemory shared() { return {memory.data(), static_cast<uint32_t>(memory.size())}; }
  float value(int mn, int k) const { return values[mn * kDepth + k]; }

  std::vector<std::byte> memory;
  std::vector<float> values;
};

constexpr emulator::Major major_of(GMMA::Major major) {
  return major == GMMA::Major::K ? emulator::Major::kK : emulator::Major::kMn;
}

// The product of a matrix with itself, so that one shared memory holds both operands.
template <GMMA::Major kMajor, class Atom>
void products_of_shared_operands() {
  Matrix<kMajor, Atom, 64> matrix(1);
  emulator::Wgmma op;
  op.n = 64;
  op.major_a = op.major_b = major_of(kMajor);
  op.accumulates = false;  // what D held is overwritten
  std::vector<float> d(128 * 32, NAN);
  std::vector<float> negated(128 * 32, 0);
  for (int k = 0; k < 4; ++k) {
    emulator::wgmma(op, matrix.shared(), matrix.descriptor(k), matrix.descriptor(k), d.data());
    op.accumulates = true;
    op.sign_b = -1;
    emulator::wgmma(op, matrix.shared(), matrix.descriptor(k), matrix.descriptor(k),
                    negated.data());
    op.sign_b = 1;
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 32; ++i) {
      int const place = GMMA::CLayout_64xN<64>{}(thread, i);
      float sum = 0;  // of multiples of 1/64: exact
      for (int k = 0; k < 64; ++k) {
        sum += matrix.value(place % 64, k) * matrix.value(place / 64, k);
      }
      CHECK(d[thread * 32 + i] == sum);
      CHECK(negated[thread * 32 + i] == -sum);
    }
  }
}

// A from registers, B of n rows.
template <GMMA::Major kMajor, class Atom, int kN>
void products_of_register_operands() {
  Matrix<kMajor, Atom, kN> matrix(2);
  std::vector<uint32_t> a(128 * 4);
  std::vector<float> values(64 * 16);
  for (int i = 0; i < 64 * 16; ++i) {
    values[i] = static_cast<float>(i % 29 - 14) / 4;
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 8; ++i) {
      uint32_t const bits = bits_of(bfloat16_t(values[GMMA::ALayout_64x16{}(thread, i)]));
      a[thread * 4 + i / 2] |= bits << 16 * (i % 2);
    }
  }
  emulator::Wgmma op;
  op.n = kN;
  op.major_b = major_of(kMajor);
  std::vector<float> d(128 * kN / 2, 0.5f);
  emulator::wgmma(op, matrix.shared(), a.data(), matrix.descriptor(1), d.data());
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      int const place = GMMA::CLayout_64xN<kN>{}(thread, i);
      float sum = 0.5f;
      for (int k = 0; k < 16; ++k) {
        sum += values[place % 64 + 64 * k] * matrix.value(place / 64, 16 + k);
      }
      CHECK(d[thread * kN / 2 + i] == sum);
    }
  }
}

void halves_are_read() {
  std::vector<std::byte> memory(4096);
  uint16_t const zero = 0;
  uint16_t const least = 0x0001;  // 2^-24
  for (int i = 0; i < 64 * 16; ++i) {
    std::memcpy(memory.data() + 2 * i, i % 2 == 0 ? &zero : &least, 2);
  }
  emulator::Wgmma op;
  op.element = Element::kFloat16;
  std::vector<uint32_t> a(128 * 4, 0x3c003c00);  // ones
  std::vector<float> d(128 * 4, 0);
  uint64_t const plain = uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
  emulator::wgmma(op, {memory.data(), 4096}, a.data(), plain, d.data());
  CHECK(d[0] == 8 * 0x1p-24f);
  op.n = 12;
  CHECK(throws<emulator::Fault>(
      [&] { emulator::wgmma(op, {memory.data(), 4096}, a.data(), plain, d.data()); }));
  CHECK(throws<emulator::Fault>([&] { emulator::read_descriptor(uint64_t{1} << 49); }));
}

template <GMMA::Major kMajor, class... Atoms>
void products() {
  (products_of_shared_operands<kMajor, Atoms>(), ...);
  (products_of_register_operands<kMajor, Atoms, 64>(), ...);
  (products_of_register_operands<kMajor, Atoms, 192>(), ...);
}

}  // namespace

void test_wgmma() {
  accumulators_lie_as_in_cute<8>();
  accumulators_lie_as_in_cute<80>();
  accumulators_lie_as_in_cute<256>();
  a_registers_lie_as_in_cute();
  using Type = bfloat16_t;
  products<GMMA::Major::K, GMMA::Layout_K_INTER_Atom<Type>, GMMA::Layout_K_SW32_Atom<Type>,
           GMMA::Layout_K_SW64_Atom<Type>, GMMA::Layout_K_SW128_Atom<Type>>();
  products<GMMA::Major::MN, GMMA::Layout_MN_INTER_Atom<Type>, GMMA::Layout_MN_SW32_Atom<Type>,
           GMMA::Layout_MN_SW64_Atom<Type>, GMMA::Layout_MN_SW128_Atom<Type>>();
  halves_are_read();
}

}  // namespace unit_tests
