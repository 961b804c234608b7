// The matrix instruction of 64 rows x 80 keys, both operands in shared memory. CuTe defines it only
// together with all other widths, whose headers add 30 s to the compile time of a file.
#pragma once

#include <type_traits>

#include "sparse_fmha/sm90/common/cute.h"

// In CuTe's namespace, as argument-dependent lookup finds the mma_unpack of these instructions only
// from there.
namespace cute::SM90::GMMA {

// Element: half_t or bfloat16_t.
template <class Element, Major kMajorA, Major kMajorB>
struct ScoresOf80Keys {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[40];

  CUTE_HOST_DEVICE static void fma(uint64_t const& desc_a, uint64_t const& desc_b, float& d00,
                                   float& d01, float& d02, float& d03, float& d04, float& d05,
                                   float& d06, float& d07, float& d08, float& d09, float& d10,
                                   float& d11, float& d12, float& d13, float& d14, float& d15,
                                   float& d16, float& d17, float& d18, float& d19, float& d20,
                                   float& d21, float& d22, float& d23, float& d24, float& d25,
                                   float& d26, float& d27, float& d28, float& d29, float& d30,
                                   float& d31, float& d32, float& d33, float& d34, float& d35,
                                   float& d36, float& d37, float& d38, float& d39,
                                   ScaleOut const scale_D = ScaleOut::One) {
#if defined(CUTE_ARCH_MMA_SM90A_ENABLED)
#define SPARSE_FMHA_WGMMA(TYPE)                                                                 \
  asm volatile(                                                                                 \
      "{\n"                                                                                     \
      ".reg .pred p;\n"                                                                         \
      "setp.ne.b32 p, %42, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n80k16.f32." TYPE "." TYPE                               \
      " "                                                                                       \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "                           \
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "                       \
      "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, "                      \
      "%40, %41, p, 1, 1, %43, %44;\n"                                                          \
      "}\n"                                                                                     \
      : "+f"(d00), "+f"(d01), "+f"(d02), "+f"(d03), "+f"(d04), "+f"(d05), "+f"(d06), "+f"(d07), \
        "+f"(d08), "+f"(d09), "+f"(d10), "+f"(d11), "+f"(d12), "+f"(d13), "+f"(d14), "+f"(d15), \
        "+f"(d16), "+f"(d17), "+f"(d18), "+f"(d19), "+f"(d20), "+f"(d21), "+f"(d22), "+f"(d23), \
        "+f"(d24), "+f"(d25), "+f"(d26), "+f"(d27), "+f"(d28), "+f"(d29), "+f"(d30), "+f"(d31), \
        "+f"(d32), "+f"(d33), "+f"(d34), "+f"(d35), "+f"(d36), "+f"(d37), "+f"(d38), "+f"(d39)  \
      : "l"(desc_a), "l"(desc_b), "r"(int32_t(scale_D)), "n"(int32_t(kMajorA)),                 \
        "n"(int32_t(kMajorB)))
    if constexpr (std::is_same_v<Element, half_t>) {
      SPARSE_FMHA_WGMMA("f16");
    } else {
      SPARSE_FMHA_WGMMA("bf16");
    }
#undef SPARSE_FMHA_WGMMA
#else
    CUTE_INVALID_CONTROL_PATH("wgmma needs sm_90a");
#endif
  }
};

}  // namespace cute::SM90::GMMA

namespace cute {

template <class Element, GMMA::Major kMajorA, GMMA::Major kMajorB>
struct MMA_Traits<SM90::GMMA::ScoresOf80Keys<Element, kMajorA, kMajorB>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<kMajorA>;
  using FrgTypeB = GMMA::smem_desc<kMajorB>;
  using Shape_MNK = Shape<_64, _80, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 16>;
  using BLayout = GMMA::ABLayout<80, 16>;
  using CLayout = GMMA::CLayout_64xN<80>;

  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;  // CuTe's code reads it by this name
};

}  // namespace cute
