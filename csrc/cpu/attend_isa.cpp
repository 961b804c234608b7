// Compiled once per instruction set. The linker must not merge any of this code with that of
// another set, so all of it is in the instruction set's namespace or inlined.
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/attend.h"
#include "sparse_fmha/cpu/in_unit.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class M, class Element, bool kSkips>
constexpr IsaKernel instance() {
  static_assert(is_mechanism<M>());
  using Pass = Attend<M, Element, kSkips>;
  return {Pass::scratch_bytes, run_in_unit<Pass, FmhaProblem, TileShape>};
}

template <class Element, bool kSkips, class List>
struct ByMechanism;
template <class Element, bool kSkips, class... M>
struct ByMechanism<Element, kSkips, MechanismList<M...>> {
  static constexpr IsaKernel kKernels[] = {instance<M, Element, kSkips>()...};
};

template <class Element>
IsaKernel of_element(size_t mechanism, bool skips) {
  return skips ? ByMechanism<Element, true, Mechanisms>::kKernels[mechanism]
               : ByMechanism<Element, false, Mechanisms>::kKernels[mechanism];
}

}  // namespace

IsaKernel kernel(DataType dtype, size_t mechanism, bool skips) {
  return with_element(
      dtype, [&](auto element) { return of_element<decltype(element)>(mechanism, skips); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
