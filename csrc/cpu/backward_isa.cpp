// Compiled once per instruction set, like attend_isa.cpp.
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/backward/kept_keys.h"
#include "sparse_fmha/cpu/backward/keys.h"
#include "sparse_fmha/cpu/backward/queries.h"
#include "sparse_fmha/cpu/backward/row_terms.h"
#include "sparse_fmha/cpu/backward/stripe_keys.h"
#include "sparse_fmha/cpu/in_unit.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Stage>
constexpr BackwardStage stage() {
  return {Stage::scratch_bytes, run_in_unit<Stage, FmhaProblem, BackwardPlan>};
}

template <class Element, class List>
struct ByMechanism;
template <class Element, class... M>
struct ByMechanism<Element, MechanismList<M...>> {
  static constexpr BackwardStages kAll[] = {{stage<RowTerms<M, Element, false>>(),
                                             stage<QueryGradients<M, Element, false>>(),
                                             stage<KeyGradients<M, Element>>()}...};
  static constexpr BackwardStages kKept[] = {{stage<RowTerms<M, Element, true>>(),
                                              stage<QueryGradients<M, Element, true>>(),
                                              stage<KeptKeyGradients<M, Element>>()}...};
};

template <class Element>
BackwardStages of_element(size_t mechanism, bool skips) {
  using Stages = ByMechanism<Element, Mechanisms>;
  return skips ? Stages::kKept[mechanism] : Stages::kAll[mechanism];
}

}  // namespace

BackwardStages backward(DataType dtype, size_t mechanism, bool skips) {
  return with_element(
      dtype, [&](auto element) { return of_element<decltype(element)>(mechanism, skips); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
