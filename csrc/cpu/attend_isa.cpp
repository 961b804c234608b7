// Compiled once per instruction set. Nothing from here may be merged by the linker with code for
// another one: all of it is in the instruction set's namespace or inlined.
#include "sparse_fmha/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/attend.h"
#include "sparse_fmha/cpu/isa.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class M, class Element>
constexpr IsaKernel instance() {
  static_assert(is_mechanism<M>());
  return {Attend<M, Element>::scratch_bytes, Attend<M, Element>::run};
}

template <class Element>
constexpr IsaKernel kByMechanism[] = {
    instance<Dense, Element>(), instance<Causal, Element>(), instance<Neighborhood, Element>(),
    instance<BlockSparse, Element>(), instance<Stripe, Element>()};

}  // namespace

IsaKernel kernel(DataType dtype, size_t mechanism) {
  switch (dtype) {
    case DataType::kFloat16:
      return kByMechanism<Half>[mechanism];
    case DataType::kBFloat16:
      return kByMechanism<BFloat16>[mechanism];
    case DataType::kFloat32:
      return kByMechanism<float>[mechanism];
    case DataType::kFloat64:
      return kByMechanism<double>[mechanism];
  }
  return {};
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
