// Descriptors of sm100/descriptor.h against CuTe's, bit for bit, over every layout that attention
// uses, and over swizzles that it does not. Prints the number of comparisons.
//
// Shared memory is addresses from zero on: pointers are integers.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline std::size_t __cvta_generic_to_shared(void const* p) {
  return reinterpret_cast<std::size_t>(p);
}

#include <cute/tensor.hpp>

#include <cute/atom/mma_traits_sm100.hpp>

#include "sparse_fmha/sm100/descriptor.h"

using namespace cute;
namespace ours = sparse_fmha::sm100;

int compared = 0;

template <class... Where>
void check(uint64_t mine, uint64_t cutes, char const* what, Where... where) {
  ++compared;
  if (mine != cutes) {
    std::printf("%s", what);
    (std::printf(" %lld", static_cast<long long>(where)), ...);
    std::printf(": %016llx, CuTe has %016llx\n", static_cast<unsigned long long>(mine),
                static_cast<unsigned long long>(cutes));
    std::exit(1);
  }
}

template <class T>
auto smem(uint32_t address) {
  return make_smem_ptr(reinterpret_cast<T*>(static_cast<std::size_t>(address)));
}

// Every step of a tile of `rows` x `columns`, both ways, and the address of every element.
template <class T, int kRows, int kColumns>
void check_tile(uint32_t address) {
  ours::Tile const tile{address, kRows, kColumns};
  // Panels of 64 columns one after the other.
  auto const by_depth = tile_to_shape(UMMA::Layout_K_SW128_Atom<T>{},
                                      Shape<Int<kRows>, Int<kColumns>>{}, Step<_1, _2>{});
  auto const columns = make_tensor(smem<T>(address), by_depth);
  for_each(make_seq<kColumns / 16>{}, [&](auto s) {
    auto const step = local_tile(columns, Shape<Int<kRows>, _16>{}, make_coord(_0{}, s));
    check(ours::matrix_descriptor(ours::step_of_columns(tile, s)),
          UMMA::make_umma_desc<UMMA::Major::K>(step), "step of columns", kRows, kColumns, int(s),
          address);
  });
  // The same memory with the columns as outer index.
  auto const by_outer = tile_to_shape(UMMA::Layout_MN_SW128_Atom<T>{},
                                      Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{});
  auto const rows = make_tensor(smem<T>(address), by_outer);
  for_each(make_seq<kRows / 16>{}, [&](auto s) {
    auto const step = local_tile(rows, Shape<Int<kColumns>, _16>{}, make_coord(_0{}, s));
    check(ours::matrix_descriptor(ours::step_of_rows(tile, s)),
          UMMA::make_umma_desc<UMMA::Major::MN>(step), "step of rows", kRows, kColumns, int(s),
          address);
  });
  auto const swizzled = as_position_independent_swizzle_layout(by_depth);
  auto const transposed = as_position_independent_swizzle_layout(by_outer);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      uint32_t const mine = ours::address_of(tile, row, column);
      check(mine, address + 2 * swizzled(row, column), "address", row, column);
      check(mine, address + 2 * transposed(column, row), "address, transposed", row, column);
    }
  }
}

// A layout that attention does not use.
template <UMMA::Major kMajor, class Atom, class Shape>
void check_other(ours::Swizzle swizzle, uint32_t leading, uint32_t stride, uint32_t address) {
  auto const tensor = make_tensor(smem<half_t>(address), tile_to_shape(Atom{}, Shape{}));
  check(ours::matrix_descriptor({address, leading, stride, swizzle}),
        UMMA::make_umma_desc<kMajor>(tensor), "other layout", int(swizzle), leading, stride);
}

template <class T, int kRows, int kColumns, UMMA::Major kA, UMMA::Major kB>
void check_product(ours::Format format) {
  auto major = [](UMMA::Major m) { return static_cast<ours::Major>(static_cast<uint32_t>(m)); };
  ours::Product product{format, kRows, kColumns, major(kA), major(kB)};
  if (!ours::is_valid(product)) {
    std::printf("a product that is used is not valid\n");
    std::exit(1);
  }
  check(ours::instruction_descriptor(product),
        uint32_t(UMMA::make_instr_desc<T, T, float, kRows, kColumns, kA, kB>()), "product", kRows,
        kColumns, int(kA), int(kB));
  product.negate_a = true;
  check(ours::instruction_descriptor(product),
        uint32_t(UMMA::make_instr_desc<T, T, float, kRows, kColumns, kA, kB, UMMA::ScaleIn::Neg>()),
        "negated product", kRows, kColumns);
}

template <class T>
void check_products(ours::Format format) {
  for_each(make_seq<16>{}, [&](auto n) {
    constexpr int kColumns = 16 * (decltype(n)::value + 1);
    for_each(cute::tuple<_64, _128, _256>{}, [&](auto m) {
      constexpr int kRows = decltype(m)::value;
      check_product<T, kRows, kColumns, UMMA::Major::K, UMMA::Major::K>(format);
      check_product<T, kRows, kColumns, UMMA::Major::K, UMMA::Major::MN>(format);
      check_product<T, kRows, kColumns, UMMA::Major::MN, UMMA::Major::K>(format);
    });
  });
  check(ours::instruction_descriptor(ours::scores_product(format, 128, false)),
        uint32_t(UMMA::make_instr_desc<T, T, float, 128, 128, UMMA::Major::K, UMMA::Major::K>()),
        "scores");
  check(ours::instruction_descriptor(ours::output_product(format, 64)),
        uint32_t(UMMA::make_instr_desc<T, T, float, 128, 64, UMMA::Major::K, UMMA::Major::MN>()),
        "output");
}

template <class T>
void check_tiles(uint32_t address) {
  for_each(cute::tuple<_64, _128>{}, [&](auto rows) {  // keys of a tile; queries are 128
    for_each(cute::tuple<_64, _128, _256>{}, [&](auto dim) {
      check_tile<T, decltype(rows)::value, decltype(dim)::value>(address);
    });
  });
}

int main() {
  for (uint32_t address : {0u, 1024u, 65536u, 200704u}) {
    check_tiles<half_t>(address);
    check_tiles<bfloat16_t>(address);
  }
  using Kt = Shape<_128, _16>;
  using Nt = Shape<_128, _16>;
  constexpr auto kK = UMMA::Major::K;
  constexpr auto kMn = UMMA::Major::MN;
  check_other<kK, UMMA::Layout_K_SW32_Atom<half_t>, Kt>(ours::Swizzle::k32, 16, 256, 2048);
  check_other<kK, UMMA::Layout_K_INTER_Atom<half_t>, Kt>(ours::Swizzle::kNone, 2048, 128, 2048);
  check_other<kMn, UMMA::Layout_MN_SW64_Atom<half_t>, Nt>(ours::Swizzle::k64, 512, 2048, 4096);
  check_other<kMn, UMMA::Layout_MN_SW32_Atom<half_t>, Nt>(ours::Swizzle::k32, 256, 2048, 4096);
  check_other<kMn, UMMA::Layout_MN_INTER_Atom<half_t>, Nt>(ours::Swizzle::kNone, 2048, 128, 4096);
  check_products<half_t>(ours::Format::kFloat16);
  check_products<bfloat16_t>(ours::Format::kBFloat16);
  std::printf("%d\n", compared);
}
