# CPU code that is compiled once per instruction set and chosen at run time: csrc/cpu/*_isa.cpp.
# SPARSE_FMHA_ISA is the name of the namespace that the variant's code lives in.

# Infinities stand for masked scores, so -ffast-math is out.
set(CPU_MATH_FLAGS -O3 -fno-math-errno -fno-trapping-math)

set(CPU_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CPU_ISAS avx2 avx512 avx512_bf16)
endif()
set(CPU_FLAGS_baseline "")
set(CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(CPU_FLAGS_avx512_bf16 ${CPU_FLAGS_avx512} -mavx512bf16)
# It has bf16 dot products, for the passes that multiply matrices of bf16.
set(CPU_SOURCES_avx512_bf16 attend backward)

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
    target_compile_definitions(sparse_fmha_cpu_${isa} PRIVATE SPARSE_FMHA_ISA=${isa})
    target_compile_options(sparse_fmha_cpu_${isa} PRIVATE ${CPU_MATH_FLAGS} ${CPU_FLAGS_${isa}})
    target_sources(${core} PRIVATE $<TARGET_OBJECTS:sparse_fmha_cpu_${isa}>)
  endforeach()
endfunction()
