// Decode attention, compiled once per instruction set (for the requirements see attend_isa.cpp).
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/decode.h"
#include "sparse_fmha/cpu/decode_partial.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Element, bool kSkips>
DecodeIsa instance() {
  return {Decode<Element, kSkips>::scratch_bytes, Partial<Element>::bytes,
          Decode<Element, kSkips>::run, merge_partials<Element>};
}

template <class Element>
DecodeIsa of_element(bool skips) {
  return skips ? instance<Element, true>() : instance<Element, false>();
}

}  // namespace

DecodeIsa decode(DataType dtype, bool skips) {
  return with_element(dtype, [&](auto element) { return of_element<decltype(element)>(skips); });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
