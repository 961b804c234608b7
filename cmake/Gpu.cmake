# The GPU kernels: which architectures, and one object file for each row of csrc/kernels/sm90_forward.def.

set(GPU_GENERATED_DIR "${PROJECT_BINARY_DIR}/generated")
set(GPU_KERNELS "")  # names of the rows that get built

# The name that an architecture has in kernel names, by what nvcc calls it: GPU_NAME_90a.
set(archs_def "${PROJECT_SOURCE_DIR}/include/sparse_fmha/core/archs.def")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${archs_def}")
file(STRINGS "${archs_def}" arch_rows REGEX "^SPARSE_FMHA_ARCH\\(")
foreach(row IN LISTS arch_rows)
  if(NOT row MATCHES "^SPARSE_FMHA_ARCH\\(k[A-Za-z0-9]+, ([a-z0-9]+), ([a-z0-9]+)\\)$")
    message(FATAL_ERROR "core/archs.def: cannot read: ${row}")
  endif()
  set(GPU_NAME_${CMAKE_MATCH_2} ${CMAKE_MATCH_1})
endforeach()
# Keys of a tile for which CuTe has matrix instructions without its extended shapes (sm90/common/cute.h).
set(GPU_MMA_WIDTHS "16|32|64|96|128|192|256")
# A list, or "none: " and the reason.
locate(archs GPU_ARCHS)
if(GPU_ARCHS MATCHES "^none: ")
  string(REPLACE "none: " "" reason "${GPU_ARCHS}")
  message(STATUS "GPU kernels: none, ${reason}")
  set(GPU_ARCHS "")
endif()

if(GPU_ARCHS)
  locate(nvcc nvcc)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # set for each target
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  include(Cutlass)
  message(STATUS "GPU kernels: ${GPU_ARCHS}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, "
                 "CUTLASS ${CUTLASS_VERSION}")
endif()

# sm90_dense_bfloat16_d128 of the arguments (sm90, Dense, bfloat16_t, 128, ...).
function(kernel_name out arch mechanism element head_dim)
  string(REGEX REPLACE "([a-z0-9])([A-Z])" "\\1_\\2" mechanism "${mechanism}")
  string(TOLOWER "${mechanism}" mechanism)
  if(element STREQUAL "half_t")
    set(dtype float16)
  elseif(element STREQUAL "bfloat16_t")
    set(dtype bfloat16)
  else()
    message(FATAL_ERROR "kernels.def: element ${element} is neither half_t nor bfloat16_t")
  endif()
  set(${out} "${arch}_${mechanism}_${dtype}_d${head_dim}" PARENT_SCOPE)
endfunction()

# One source file of a few lines for each row of `def` whose architecture is wanted, and
# kernel_rows.inc, which names them all for the registry.
function(add_gpu_kernels core def)
  set(def "${PROJECT_SOURCE_DIR}/${def}")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${def}")
  file(STRINGS "${def}" lines REGEX "^SPARSE_FMHA_KERNEL")
  set(kernels "")
  set(rows "")
  foreach(target_arch IN LISTS GPU_ARCHS)
    set(wanted "${GPU_NAME_${target_arch}}")
    set(sources "")
    foreach(line IN LISTS lines)
      if(NOT line MATCHES "^SPARSE_FMHA_KERNEL\\(([^()]+)\\)$")
        message(FATAL_ERROR "kernels.def: cannot read: ${line}")
      endif()
      string(REGEX REPLACE "[ \t]*,[ \t]*" ";" fields "${CMAKE_MATCH_1}")
      list(LENGTH fields count)
      if(NOT count EQUAL 9)
        message(FATAL_ERROR "kernels.def: ${count} fields where 9 belong: ${line}")
      endif()
      list(POP_FRONT fields arch mechanism element head_dim tile_q tile_k stages schedule skipping)
      if(NOT arch STREQUAL wanted)
        continue()
      endif()
      kernel_name(name ${arch} ${mechanism} ${element} ${head_dim})
      if(skipping STREQUAL "kByThreshold")
        string(APPEND name "_skip")
      endif()
      if(name IN_LIST kernels)
        message(FATAL_ERROR "kernels.def: a second row for ${name}")
      endif()
      set(widths "")
      if(NOT tile_k MATCHES "^(${GPU_MMA_WIDTHS})$")
        set(widths "#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n")
      endif()
      file(CONFIGURE OUTPUT "${GPU_GENERATED_DIR}/${name}.cu" @ONLY CONTENT
"@widths@#include \"sparse_fmha/@arch@/forward/launch.h\"

namespace sparse_fmha {
KernelRow @name@() {
  return @arch@::kernel_row<@mechanism@, cutlass::@element@, @head_dim@, @tile_q@, @tile_k@, @stages@, @arch@::Schedule::@schedule@, @arch@::Skipping::@skipping@>(\"@name@\");
}
}  // namespace sparse_fmha
")
      list(APPEND sources "${GPU_GENERATED_DIR}/${name}.cu")
      list(APPEND kernels ${name})
      string(APPEND rows "SPARSE_FMHA_ROW(${name})\n")
    endforeach()
    add_kernel_objects(${core} sm${target_arch} "${target_arch}" ${sources})
  endforeach()
  if(GPU_ARCHS)  # what every architecture runs
    file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/device/*.cu")
    add_kernel_objects(${core} device "${GPU_ARCHS}" ${sources})
  endif()
  file(CONFIGURE OUTPUT "${GPU_GENERATED_DIR}/kernel_rows.inc" CONTENT "${rows}" @ONLY)
  set(GPU_KERNELS "${kernels}" PARENT_SCOPE)
endfunction()

# Compiles ARGN for `archs` as part of the core.
function(add_kernel_objects core name archs)
  set(target sparse_fmha_${name})
  set(launcher "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/ptxas.py" compile)
  if(CCACHE)
    list(APPEND launcher "${CCACHE}")
  endif()
  list(TRANSFORM archs APPEND -real OUTPUT_VARIABLE real_archs)
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${real_archs}"
    CUDA_COMPILER_LAUNCHER "${launcher}")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/include")
  target_include_directories(${target} SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
  target_compile_options(${target} PRIVATE --expt-relaxed-constexpr --expt-extended-lambda -lineinfo
    "SHELL:-Xptxas -v" "SHELL:-Xfatbin -compress-all")
  target_sources(${core} PRIVATE $<TARGET_OBJECTS:${target}>)
  target_link_libraries(${core} PUBLIC CUDA::cudart_static)
endfunction()

# build_info.inc for `target`: what was built with what, and the ptxas figures of every kernel.
function(add_build_info target)
  set(basics "${GPU_GENERATED_DIR}/basics.json")
  set(info "${GPU_GENERATED_DIR}/build_info.inc")
  set(objects "")
  set(names ${GPU_ARCHS})
  list(TRANSFORM names PREPEND sm)
  if(names)
    list(APPEND names device)
  endif()
  foreach(name IN LISTS names)
    list(APPEND objects $<TARGET_OBJECTS:sparse_fmha_${name}>)
  endforeach()
  list(JOIN GPU_ARCHS "\", \"" archs)
  if(archs)
    set(archs "\"${archs}\"")
  endif()
  file(CONFIGURE OUTPUT "${basics}" @ONLY CONTENT
"{
  \"version\": \"@PROJECT_VERSION@\",
  \"archs\": [@archs@],
  \"cpu_isas\": \"@CPU_ISAS@\",
  \"compiler\": \"@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@\",
  \"torch\": \"@TORCH_VERSION@\",
  \"cuda\": \"@CMAKE_CUDA_COMPILER_VERSION@\",
  \"cutlass\": \"@CUTLASS_VERSION@\"
}
")
  add_custom_command(OUTPUT "${info}"
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/ptxas.py" collect
            "${basics}" "${info}" ${objects}
    DEPENDS "${basics}" "${PROJECT_SOURCE_DIR}/tools/ptxas.py" ${objects}
    COMMAND_EXPAND_LISTS VERBATIM COMMENT "Collecting build information")
  target_sources(${target} PRIVATE "${info}")
endfunction()
