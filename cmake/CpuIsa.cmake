# CPU code that is compiled once per instruction set and chosen at run time: csrc/cpu/*_isa.cpp.
# SPARSE_FMHA_ISA is the name of the namespace that the variant's code lives in.

# Infinities stand for masked scores, so -ffast-math is out.
set(CPU_MATH_FLAGS -O3 -fno-math-errno -fno-trapping-math)

set(CPU_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CPU_ISAS avx2 avx512 avx512_bf16)
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_FLAGS "-mamx-tile -mamx-bf16")
  check_cxx_source_compiles(
    "int main() { asm volatile(\"tdpbf16ps %tmm2, %tmm1, %tmm0\"); asm volatile(\"tilerelease\"); }"
    HAS_AMX)
  unset(CMAKE_REQUIRED_FLAGS)
  if(HAS_AMX)
    list(APPEND CPU_ISAS avx512_amx)
  else()
    message(STATUS "No CPU code for avx512_amx: the compiler or its assembler lacks "
      "-mamx-tile -mamx-bf16 (GCC 11, Clang 12, binutils 2.35)")
  endif()
endif()
set(CPU_FLAGS_baseline "")
set(CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(CPU_FLAGS_avx512_bf16 ${CPU_FLAGS_avx512} -mavx512bf16)
set(CPU_FLAGS_avx512_amx ${CPU_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
# They have products of bf16, for the passes that multiply matrices of bf16.
set(CPU_SOURCES_avx512_bf16 attend backward)
set(CPU_SOURCES_avx512_amx attend backward)

# The type of the tile registers (cpu/amx/registers.h).
option(SPARSE_FMHA_EMULATED_TILES
  "avx512_amx computes in C++ and is taken on any CPU with avx512_bf16, slowly; for tests" OFF)
set(CPU_TILE_REGISTERS AmxRegisters)
if(SPARSE_FMHA_EMULATED_TILES)
  if(NOT "avx512_amx" IN_LIST CPU_ISAS)
    message(FATAL_ERROR "SPARSE_FMHA_EMULATED_TILES needs a compiler with code for avx512_amx")
  endif()
  set(CPU_TILE_REGISTERS EmulatedRegisters)
endif()
set(CPU_DEFINITIONS_avx512_amx SPARSE_FMHA_TILE_REGISTERS=${CPU_TILE_REGISTERS})

function(add_isa_variants core)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cpu/*_isa.cpp")
  if(NOT sources)
    return()
  endif()
  foreach(isa IN LISTS CPU_ISAS)
    set(own ${sources})
    if(CPU_SOURCES_${isa})
      list(JOIN CPU_SOURCES_${isa} "|" names)
      list(FILTER own INCLUDE REGEX "/(${names})_isa\\.cpp$")
    endif()
    add_library(sparse_fmha_cpu_${isa} OBJECT ${own})
    target_include_directories(sparse_fmha_cpu_${isa} PRIVATE "${PROJECT_SOURCE_DIR}/include")
    target_compile_definitions(sparse_fmha_cpu_${isa} PRIVATE
      SPARSE_FMHA_ISA=${isa} ${CPU_DEFINITIONS_${isa}})
    target_compile_options(sparse_fmha_cpu_${isa} PRIVATE ${CPU_MATH_FLAGS} ${CPU_FLAGS_${isa}})
    target_sources(${core} PRIVATE $<TARGET_OBJECTS:sparse_fmha_cpu_${isa}>)
  endforeach()
  if(avx512_amx IN_LIST CPU_ISAS)
    target_compile_definitions(${core} PRIVATE SPARSE_FMHA_HAS_AMX)
  endif()
  if(SPARSE_FMHA_EMULATED_TILES)
    set_property(SOURCE csrc/core/cpu_isa.cpp APPEND PROPERTY COMPILE_DEFINITIONS
      SPARSE_FMHA_EMULATED_TILES)
  endif()
endfunction()
