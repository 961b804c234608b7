// Declarations of variables, in a module, a parameter list or a body.
#pragma once

#include "kernel.h"
#include "tokens.h"

namespace emulator::ptx {

uint32_t bytes_of_type(std::string_view type, Cursor const& where);  // ".b32" is 4

// Reads from the state space on, ".shared .align 4 .b8 name[16] = {1, 2}", up to the mark after it.
Variable read_variable(Cursor& cursor, std::string_view space, bool external);

uint64_t read_integer(Cursor& cursor);

}  // namespace emulator::ptx
