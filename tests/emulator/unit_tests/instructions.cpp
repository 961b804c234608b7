// Instructions of single lanes against formulas for their results.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "check.h"
#include "run_ptx.h"

namespace unit_tests {
namespace {

using Formula = std::function<uint64_t(uint64_t, uint64_t, uint64_t)>;

uint64_t mask_of(std::string const& type) {
  int const bits = type == "pred" ? 1 : std::stoi(type.substr(1));
  return bits == 64 ? ~0ull : (1ull << bits) - 1;
}

float as_float(uint64_t bits) {
  auto const low = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &low, 4);
  return value;
}
uint64_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float bfloat(uint64_t bits) { return as_float((bits & 0xffff) << 16); }

void expect(char const* code, std::array<std::string, 4> const& types, Formula const& formula) {
  std::mt19937_64 random(7);
  uint64_t const edges[] = {0, 1, ~0ull, 0x8000000080008000, 0x7fffffff7fff7fff, 31, 32, 33, 64};
  for (int round = 0; round < 8; ++round) {
    Lanes in[3];
    for (int k = 0; k < 3; ++k) {
      for (uint64_t& value : in[k]) {
        value = random();
        if (types[k + 1][0] == 'f') {  // no NaN, and sums of like sizes
          auto const number = static_cast<float>(static_cast<int64_t>(value)) * 0x1p-60f;
          value = random() % 8 == 0 ? 0 : bits_of(number);
        } else if (random() % 3 == 0) {
          value = edges[random() % std::size(edges)];
        } else if (random() % 2 == 0) {
          value &= 0xff;
        }
        value &= mask_of(types[k + 1]);
      }
    }
    Lanes const out = run_ptx(code, types, in[0], in[1], in[2]);
    bool same = true;
    for (int lane = 0; lane < 32; ++lane) {
      uint64_t const wanted = formula(in[0][lane], in[1][lane], in[2][lane]) & mask_of(types[0]);
      if (out[lane] != wanted && same) {
        std::printf("%s of %llx, %llx, %llx: %llx, not %llx\n", code,
                    static_cast<unsigned long long>(in[0][lane]),
                    static_cast<unsigned long long>(in[1][lane]),
                    static_cast<unsigned long long>(in[2][lane]),
                    static_cast<unsigned long long>(out[lane]),
                    static_cast<unsigned long long>(wanted));
      }
      same &= out[lane] == wanted;
    }
    CHECK(same);
  }
}

using U = uint64_t;
int32_t s32(U x) { return static_cast<int32_t>(x); }
uint32_t u32(U x) { return static_cast<uint32_t>(x); }
int64_t s64(U x) { return static_cast<int64_t>(x); }
int16_t s16(U x) { return static_cast<int16_t>(x); }

void integers() {
  std::array<std::string, 4> const w = {"u32", "u32", "u32", "u32"};
  std::array<std::string, 4> const l = {"u64", "u64", "u64", "u64"};
  std::array<std::string, 4> const h = {"u16", "u16", "u16", "u16"};
  expect("add.s32 %d, %a, %b;", w, [](U a, U b, U) { return a + b; });
  expect("sub.s64 %d, %a, %b;", l, [](U a, U b, U) { return a - b; });
  expect("mul.lo.s32 %d, %a, %b;", w, [](U a, U b, U) { return a * b; });
  expect("mul.hi.s32 %d, %a, %b;", w,
         [](U a, U b, U) { return U(int64_t{s32(a)} * s32(b) >> 32); });
  expect("mul.hi.u32 %d, %a, %b;", w, [](U a, U b, U) { return a * b >> 32; });
  expect("mul.wide.s32 %d, %a, %b;", {"u64", "u32", "u32", "u32"},
         [](U a, U b, U) { return U(int64_t{s32(a)} * s32(b)); });
  expect("mad.wide.u32 %d, %a, %b, %c;", {"u64", "u32", "u32", "u64"},
         [](U a, U b, U c) { return a * b + c; });
  expect("mul.wide.u16 %d, %a, %b;", {"u32", "u16", "u16", "u16"},
         [](U a, U b, U) { return a * b; });
  expect("mad.lo.s32 %d, %a, %b, %c;", w, [](U a, U b, U c) { return a * b + c; });
  expect("div.s32 %d, %a, %b;", w,
         [](U a, U b, U) -> U { return s32(b) == 0 ? ~0u : U(int64_t{s32(a)} / s32(b)); });
  expect("rem.u32 %d, %a, %b;", w, [](U a, U b, U) { return b == 0 ? a : a % b; });
  expect("min.s32 %d, %a, %b;", w, [](U a, U b, U) { return U(std::min(s32(a), s32(b))); });
  expect("max.s64 %d, %a, %b;", l, [](U a, U b, U) { return U(std::max(s64(a), s64(b))); });
  expect("abs.s32 %d, %a;", w, [](U a, U, U) { return U(std::abs(int64_t{s32(a)})); });
  expect("neg.s32 %d, %a;", w, [](U a, U, U) { return -a; });
  expect("shl.b32 %d, %a, %b;", w, [](U a, U b, U) { return b > 31 ? 0 : a << b; });
  expect("shr.s32 %d, %a, %b;", w,
         [](U a, U b, U) { return U(int64_t{s32(a)} >> std::min<U>(b, 32)); });
  expect("shr.u64 %d, %a, %b;", {"u64", "u64", "u32", "u32"},
         [](U a, U b, U) { return b > 63 ? 0 : a >> b; });
  expect("xor.b16 %d, %a, %b;", h, [](U a, U b, U) { return a ^ b; });
  expect("not.b32 %d, %a;", w, [](U a, U, U) { return ~a; });
  expect("not.pred %d, %a;", {"pred", "pred", "pred", "pred"}, [](U a, U, U) { return a ^ 1; });
  expect("popc.b32 %d, %a;", w, [](U a, U, U) { return U(__builtin_popcountll(a)); });
  expect("clz.b32 %d, %a;", w, [](U a, U, U) { return a == 0 ? 32 : U(__builtin_clz(u32(a))); });
  expect("bfind.shiftamt.u32 %d, %a;", w,
         [](U a, U, U) { return a == 0 ? ~0ull : U(__builtin_clz(u32(a))); });
  expect("brev.b32 %d, %a;", w, [](U a, U, U) {
    U result = 0;
    for (int k = 0; k < 32; ++k) {
      result = result << 1 | (a >> k & 1);
    }
    return result;
  });
  expect("bfi.b32 %d, %a, %b, 5, 9;", w,
         [](U a, U b, U) { return (b & ~0x3fe0ull) | (a & 0x1ff) << 5; });
  expect("bfe.s32 %d, %a, 4, 7;", w, [](U a, U, U) { return U(s32(a << 21) >> 25); });
  expect("prmt.b32 %d, %a, %b, 0x5410;", w, [](U a, U b, U) { return (a & 0xffff) | b << 16; });
  expect("prmt.b32 %d, %a, %b, 0x9a12;", w, [](U a, U, U) {
    auto const sign = [&](int k) { return (a >> (8 * k + 7) & 1) ? 0xffu : 0u; };
    return (a >> 16 & 255) | (a >> 8 & 255) << 8 | sign(2) << 16 | sign(1) << 24;
  });
  expect("lop3.b32 %d, %a, %b, %c, 0xca;", w, [](U a, U b, U c) { return (a & b) | (~a & c); });
  expect("shf.l.wrap.b32 %d, %a, %b, %c;", w,
         [](U a, U b, U c) { return (b << 32 | a) << (c & 31) >> 32; });
  expect("shf.r.clamp.b32 %d, %a, %b, %c;", w,
         [](U a, U b, U c) { return (b << 32 | a) >> std::min<U>(c, 32); });
  expect("selp.b32 %d, %a, %b, %c;", {"u32", "u32", "u32", "pred"},
         [](U a, U b, U c) { return c ? a : b; });
  expect("setp.lt.s16 %d, %a, %b;", {"pred", "u16", "u16", "u16"},
         [](U a, U b, U) { return s16(a) < s16(b); });
  expect("setp.hi.u32 %d, %a, %b;", {"pred", "u32", "u32", "u32"},
         [](U a, U b, U) { return a > b; });
  expect("setp.ge.and.s64 %d, %a, %b, !%c;", {"pred", "u64", "u64", "pred"},
         [](U a, U b, U c) { return s64(a) >= s64(b) && !c; });
  expect("mov.b64 %d, {%a, %b};", {"u64", "u32", "u32", "u32"},
         [](U a, U b, U) { return b << 32 | a; });
  expect("{ .reg .b32 x; mov.b64 {x, %d}, %a; }", {"u32", "u64", "u32", "u32"},
         [](U a, U, U) { return a >> 32; });
  expect("cvt.s64.s32 %d, %a;", {"u64", "u32", "u32", "u32"}, [](U a, U, U) { return U(s32(a)); });
  expect("cvt.u16.u32 %d, %a;", {"u16", "u32", "u32", "u32"}, [](U a, U, U) { return a; });
  expect("cvt.s64.s8 %d, %a;", {"u64", "u16", "u32", "u32"},
         [](U a, U, U) { return U(int8_t(a)); });
  expect("cvt.rn.f32.s32 %d, %a;", {"f32", "u32", "u32", "u32"},
         [](U a, U, U) { return bits_of(float(s32(a))); });
}

void floats() {
  std::array<std::string, 4> const f = {"f32", "f32", "f32", "f32"};
  auto const of = [](U x) { return as_float(x); };
  expect("add.f32 %d, %a, %b;", f, [&](U a, U b, U) { return bits_of(of(a) + of(b)); });
  expect("mul.rn.ftz.f32 %d, %a, %b;", f, [&](U a, U b, U) { return bits_of(of(a) * of(b)); });
  expect("fma.rn.f32 %d, %a, %b, %c;", f,
         [&](U a, U b, U c) { return bits_of(std::fma(of(a), of(b), of(c))); });
  expect("fma.rm.f32 %d, %a, %b, 0f3F800000;", f, [&](U a, U b, U) {
    // The product is exact in long double, and the sum has bits enough to tell its side.
    long double const exact = static_cast<long double>(of(a)) * of(b) + 1;
    auto near = static_cast<float>(exact);
    return bits_of(near > exact ? std::nextafter(near, -INFINITY) : near);
  });
  expect("setp.geu.f32 %d, %a, %b;", {"pred", "f32", "f32", "f32"},
         [&](U a, U b, U) { return !(of(a) < of(b)); });
  expect("cvt.sat.f32.f32 %d, %a;", f,
         [&](U a, U, U) { return bits_of(std::min(std::max(of(a), 0.f), 1.f)); });
  expect("cvt.rzi.s32.f32 %d, %a;", {"u32", "f32", "f32", "f32"},
         [&](U a, U, U) { return U(int64_t(of(a))); });
  expect("cvt.rni.f32.f32 %d, %a;", f, [&](U a, U, U) { return bits_of(std::nearbyint(of(a))); });
  expect("cvt.f32.bf16 %d, %a;", {"f32", "u16", "f32", "f32"},
         [&](U a, U, U) { return bits_of(bfloat(a)); });
  // The upper half comes first.
  expect("{ .reg .b32 x; cvt.rn.bf16x2.f32 x, %a, %b; shr.u32 %d, x, 16; }",
         {"u32", "f32", "f32", "f32"},
         [&](U a, U, U) { return (a + 0x7fff + (a >> 16 & 1)) >> 16; });
  expect("{ .reg .b16 x; cvt.rn.f16.f32 x, %a; cvt.f32.f16 %d, x; }", f, [&](U a, U, U) {
    int exponent;
    float const part = std::frexp(of(a), &exponent);  // 11 bits are kept
    return bits_of(std::ldexp(std::nearbyint(std::ldexp(part, 11)), exponent - 11));
  });
}

void nan_rules() {
  Lanes nan, one;
  nan.fill(0x7fc00000);
  one.fill(bits_of(1.f));
  std::array<std::string, 4> const f = {"f32", "f32", "f32", "f32"};
  CHECK(run_ptx("max.f32 %d, %a, %b;", f, nan, one)[0] == bits_of(1.f));
  CHECK(run_ptx("min.f32 %d, %b, %a;", f, nan, one)[5] == bits_of(1.f));
  CHECK(std::isnan(as_float(run_ptx("max.NaN.f32 %d, %a, %b;", f, nan, one)[0])));
  std::array<std::string, 4> const p = {"pred", "f32", "f32", "f32"};
  CHECK(run_ptx("setp.ne.f32 %d, %a, %b;", p, nan, one)[0] == 0);
  CHECK(run_ptx("setp.neu.f32 %d, %a, %b;", p, nan, one)[0] == 1);
  CHECK(run_ptx("setp.lt.f32 %d, %a, %b;", p, nan, one)[0] == 0);
  CHECK(run_ptx("setp.ltu.f32 %d, %a, %b;", p, nan, one)[0] == 1);
}

void shuffles_and_votes() {
  Lanes values, numbers;
  for (int lane = 0; lane < 32; ++lane) {
    values[lane] = 100 + lane;
    numbers[lane] = lane;
  }
  std::array<std::string, 4> const w = {"u32", "u32", "u32", "u32"};
  auto const run = [&](char const* code) { return run_ptx(code, w, values, numbers); };
  Lanes const down = run("shfl.sync.down.b32 %d, %a, 3, 0x1f, -1;");
  Lanes const up = run("shfl.sync.up.b32 %d, %a, 3, 0, -1;");
  Lanes const swapped = run("shfl.sync.bfly.b32 %d, %a, 5, 0x1f, -1;");
  Lanes const one = run("shfl.sync.idx.b32 %d, %a, 9, 0x1f, -1;");
  Lanes const quarter = run("shfl.sync.idx.b32 %d, %a, 2, 0x181f, -1;");  // of 8 lanes
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(down[lane] == static_cast<U>(lane + 3 < 32 ? 103 + lane : 100 + lane));
    CHECK(up[lane] == static_cast<U>(lane >= 3 ? 97 + lane : 100 + lane));
    CHECK(swapped[lane] == static_cast<U>(100 + (lane ^ 5)));
    CHECK(one[lane] == 109);
    CHECK(quarter[lane] == static_cast<U>(100 + lane / 8 * 8 + 2));
  }
  CHECK(run("redux.sync.add.s32 %d, %b, -1;")[4] == 496);
  CHECK(run("redux.sync.max.u32 %d, %b, -1;")[4] == 31);
  CHECK(run("{ .reg .pred p; setp.lt.u32 p, %b, 5; vote.sync.ballot.b32 %d, p, -1; }")[8] == 31);
  CHECK(run("{ .reg .pred p; setp.lt.u32 p, %b, 5; @p shfl.sync.idx.b32 %d, %a, 4, 0x1f, 31; "
            "@!p mov.u32 %d, 7; }")[3] == 104);
  // The lanes of a branch meet the others again, and lanes of one mask wait for each other.
  Lanes const parted =
      run("{ .reg .pred p; setp.lt.u32 p, %b, 5; @p bra LOW; mov.u32 %d, 1; bra DONE;\n"
          "LOW: mov.u32 %d, 2;\nDONE: redux.sync.add.s32 %d, %d, -1; }");
  CHECK(parted[0] == 37 && parted[31] == 37);
}

void faults_name_the_line() {
  Lanes const none{};
  auto const text_of = [&](char const* code) -> std::string {
    try {
      run_ptx(code, {"u32", "u32", "u32", "u32"}, none);
    } catch (emulator::Error const& error) {
      return error.what();
    }
    return "";
  };
  auto const says = [&](char const* code, char const* what) {
    std::string const text = text_of(code);
    return text.find("PTX line ") != std::string::npos && text.find(what) != std::string::npos;
  };
  CHECK(says("ld.shared.u32 %d, [memory+1024];", "not all inside"));
  CHECK(says("ld.shared.u32 %d, [memory+2];", "multiple of 4"));
  CHECK(says("trap;", "trap"));
  CHECK(says("sqrt.rp.f32 %d, %a;", "not emulated"));
  CHECK(
      says("{ .reg .pred p; mbarrier.init.shared.b64 [memory], 1;\n"
           "WAIT: mbarrier.try_wait.parity.shared.b64 p, [memory], 0; @!p bra WAIT; }",
           "does not go on"));
}

}  // namespace

void test_instructions() {
  integers();
  floats();
  nan_rules();
  shuffles_and_votes();
  faults_name_the_line();
}

}  // namespace unit_tests
