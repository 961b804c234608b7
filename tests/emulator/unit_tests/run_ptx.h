// Runs one PTX instruction in the 32 lanes of a warp.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../exec/launch.h"

namespace unit_tests {

using Lanes = std::array<uint64_t, 32>;

// `code` reads %a, %b and %c and writes %d, each of `types`: "u32 u64 u16 u16" are those of d, a, b
// and c. A register of type pred holds 0 or 1. All are also given to lanes by their number in
// %lane.
inline Lanes run_ptx(std::string const& code, std::array<std::string, 4> const& types,
                     Lanes const& a, Lanes const& b = {}, Lanes const& c = {}) {
  auto const declare = [](char name, std::string const& type) {
    return ".reg ." + (type == "pred" ? type : "b" + type.substr(1)) + " %" + name + ";\n";
  };
  std::string text =
      ".version 8.0\n.target sm_90a\n.address_size 64\n"
      ".visible .entry k(.param .u64 in, .param .u64 out)\n{\n"
      ".shared .align 1024 .b8 memory[1024];\n"
      ".reg .b64 %at, %to;\n.reg .b32 %lane, %bit;\n";
  text += declare('d', types[0]) + declare('a', types[1]) + declare('b', types[2]) +
          declare('c', types[3]);
  text +=
      "mov.u32 %lane, %laneid;\nld.param.u64 %at, [in];\nld.param.u64 %to, [out];\n"
      "mad.wide.u32 %at, %lane, 8, %at;\nmad.wide.u32 %to, %lane, 8, %to;\n";
  for (int k = 0; k < 3; ++k) {
    std::string const name(1, static_cast<char>('a' + k));
    std::string const from = "[%at+" + std::to_string(256 * k) + "];\n";
    if (types[k + 1] == "pred") {
      text += "ld.global.u32 %bit, " + from + "setp.ne.u32 %" + name + ", %bit, 0;\n";
    } else {
      text += "ld.global.b" + types[k + 1].substr(1) + " %" + name + ", " + from;
    }
  }
  text += code + "\n";
  text += types[0] == "pred" ? "selp.u32 %bit, 1, 0, %d;\nst.global.u32 [%to], %bit;\n"
                             : "st.global.b" + types[0].substr(1) + " [%to], %d;\n";
  text += "ret;\n}\n";
  std::array<Lanes, 3> in = {a, b, c};
  Lanes out{};
  void* in_pointer = in.data();
  void* out_pointer = out.data();
  void* arguments[] = {&in_pointer, &out_pointer};
  emulator::Module module(text);
  emulator::Launch launch;
  launch.block.x = 32;
  launch.arguments = arguments;
  emulator::launch(module, "k", launch);
  return out;
}

}  // namespace unit_tests
