# The GPU kernels: which architectures, and the object files of the rows of csrc/kernels/*.def.

set(GPU_GENERATED_DIR "${PROJECT_BINARY_DIR}/generated")

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
  if(SPARSE_FMHA_EMULATED)
    set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  include(Cutlass)
  message(STATUS "GPU kernels: ${GPU_ARCHS}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, "
                 "CUTLASS ${CUTLASS_VERSION}")
endif()

# Generated source files for the rows of csrc/kernels/*.def whose architecture is wanted, and for
# the kernels that reduce scores; kernel_rows.inc and score_kernels.inc name them for the registry.
function(add_gpu_kernels core)
  set(tools "${PROJECT_SOURCE_DIR}/tools/kernel_list.py"
            "${PROJECT_SOURCE_DIR}/tools/score_kernels.py")
  file(GLOB lists CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/kernels/*.def")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${lists} ${tools}
    "${PROJECT_SOURCE_DIR}/tools/arch_table.py"
    "${PROJECT_SOURCE_DIR}/include/sparse_fmha/core/archs.def"
    "${PROJECT_SOURCE_DIR}/include/sparse_fmha/core/capabilities.def")
  set(rows "${SPARSE_FMHA_ROWS}")
  if(SPARSE_FMHA_EMULATED AND NOT rows)
    set(rows "${EMULATED_ROWS}")
  endif()
  set(files "")
  foreach(tool IN LISTS tools)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${tool}" "--rows=${rows}" "${GPU_GENERATED_DIR}"
              ${GPU_ARCHS}
      OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE status
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
    if(NOT status EQUAL 0)
      message(FATAL_ERROR "${reason}")
    endif()
    string(REPLACE "\n" ";" found "${found}")
    list(APPEND files ${found})
  endforeach()
  foreach(arch IN LISTS GPU_ARCHS)
    set(sources ${files})
    list(FILTER sources INCLUDE REGEX "^${arch}:")
    list(TRANSFORM sources REPLACE "^${arch}:(.+)$" "${GPU_GENERATED_DIR}/\\1.cu")
    add_kernel_objects(${core} sm${arch} "${arch}" ${sources})
  endforeach()
  if(GPU_ARCHS)  # what every architecture runs
    file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/device/*.cu")
    add_kernel_objects(${core} device "${GPU_ARCHS}" ${sources})
  endif()
endfunction()

# nvcc's flags for the images of `archs`. What is not for Hopper alone is compiled to the PTX of
# compute_80 once, and from that to an image for each of SPARSE_FMHA_IMAGES; drivers compile the PTX
# for other GPUs.
set(SPARSE_FMHA_IMAGES "80" CACHE STRING
    "GPUs for which the kernels of 80 and 86 are assembled, besides their PTX")
function(images_of archs out)
  set(flags "")
  if(SPARSE_FMHA_EMULATED)  # PTX alone
    if("90a" IN_LIST archs)
      list(APPEND flags "SHELL:-gencode arch=compute_90a,code=compute_90a")
    else()
      list(APPEND flags "SHELL:-gencode arch=compute_80,code=compute_80")
    endif()
    set(${out} ${flags} PARENT_SCOPE)
    return()
  endif()
  if("90a" IN_LIST archs)
    list(APPEND flags "SHELL:-gencode arch=compute_90a,code=sm_90a")
  endif()
  if("80" IN_LIST archs OR "86" IN_LIST archs)
    list(APPEND flags "SHELL:-gencode arch=compute_80,code=compute_80")
    foreach(image IN LISTS SPARSE_FMHA_IMAGES)
      if(NOT (image STREQUAL "90" AND "90a" IN_LIST archs))
        list(APPEND flags "SHELL:-gencode arch=compute_80,code=sm_${image}")
      endif()
    endforeach()
  endif()
  set(${out} ${flags} PARENT_SCOPE)
endfunction()

# All images of this build: machine code, then PTX.
function(list_images out)
  set(images "")
  if("90a" IN_LIST GPU_ARCHS)
    list(APPEND images 90a)
  endif()
  if("80" IN_LIST GPU_ARCHS OR "86" IN_LIST GPU_ARCHS)
    list(APPEND images ${SPARSE_FMHA_IMAGES} compute_80)
  endif()
  set(${out} ${images} PARENT_SCOPE)
endfunction()

# Tells a source file what core/images.h needs to know.
function(say_what_is_built source)
  list_images(images)
  string(REPLACE ";" " " images "${images}")
  string(REPLACE ";" " " archs "${GPU_ARCHS}")
  set(toolkit 0)
  if(GPU_ARCHS)
    math(EXPR toolkit "${CUDAToolkit_VERSION_MAJOR} * 1000 + ${CUDAToolkit_VERSION_MINOR} * 10")
  endif()
  set_property(SOURCE ${source} APPEND PROPERTY COMPILE_DEFINITIONS
    "SPARSE_FMHA_BUILT_ARCHS=\"${archs}\"" "SPARSE_FMHA_BUILT_IMAGES=\"${images}\""
    "SPARSE_FMHA_BUILT_TOOLKIT=${toolkit}")
endfunction()

# Compiles ARGN for `archs` as part of the core.
function(add_kernel_objects core name archs)
  if(NOT ARGN)  # no row of an architecture is wanted
    return()
  endif()
  set(target sparse_fmha_${name})
  set(launcher "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/sass.py" compile
               "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/ptxas.py" compile)
  if(CCACHE)
    list(APPEND launcher "${CCACHE}")
  endif()
  images_of("${archs}" images)
  set(compression "SHELL:-Xfatbin -compress-all")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    set(compression "--compress-mode=size")  # 15 to 18 percent smaller
  endif()
  set(runtime CUDA::cudart_static)
  set(reports -lineinfo "SHELL:-Xptxas -v")
  if(SPARSE_FMHA_EMULATED)
    set(launcher "${CCACHE}")
    set(compression --no-compress)
    set(runtime emulated_cuda)
    set(reports "SHELL:-Xcompiler -O0")  # of the host code: it only describes launches
  endif()
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES OFF
    CUDA_COMPILER_LAUNCHER "${launcher}")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/include")
  target_include_directories(${target} SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
  target_compile_options(${target} PRIVATE ${images} --expt-relaxed-constexpr --expt-extended-lambda
    ${reports} ${compression})
  target_sources(${core} PRIVATE $<TARGET_OBJECTS:${target}>)
  target_link_libraries(${core} PUBLIC ${runtime})
endfunction()

# build_info.inc for the targets: what was built with what, and the ptxas figures of every kernel.
function(add_build_info)
  set(basics "${GPU_GENERATED_DIR}/basics.json")
  set(info "${GPU_GENERATED_DIR}/build_info.inc")
  set(objects "")
  set(names ${GPU_ARCHS})
  list(TRANSFORM names PREPEND sm)
  if(names)
    list(APPEND names device)
  endif()
  foreach(name IN LISTS names)
    if(TARGET sparse_fmha_${name} AND NOT SPARSE_FMHA_EMULATED)  # which ptxas reports on
      list(APPEND objects $<TARGET_OBJECTS:sparse_fmha_${name}>)
    endif()
  endforeach()
  list_images(images)
  foreach(list images GPU_ARCHS)
    list(JOIN ${list} "\", \"" quoted_${list})
    if(quoted_${list})
      set(quoted_${list} "\"${quoted_${list}}\"")
    endif()
  endforeach()
  file(CONFIGURE OUTPUT "${basics}" @ONLY CONTENT
"{
  \"version\": \"@PROJECT_VERSION@\",
  \"archs\": [@quoted_GPU_ARCHS@],
  \"images\": [@quoted_images@],
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
  add_custom_target(sparse_fmha_build_info DEPENDS "${info}")
  foreach(target IN LISTS ARGN)
    target_sources(${target} PRIVATE "${info}")
    add_dependencies(${target} sparse_fmha_build_info)
  endforeach()
endfunction()
