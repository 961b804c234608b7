# A wheel for several Pythons and for machines older than this one; tools/release.py asks for it.

# Symbols that newer compilers and C libraries would ask for: see the source file. glibc had these
# libraries apart until 2.34, so they are named.
function(ask_for_old_symbols)
  if(NOT SPARSE_FMHA_MANYLINUX)
    return()
  endif()
  foreach(target IN LISTS ARGN)
    target_sources(${target} PRIVATE csrc/compat/manylinux_2_28.cpp)
    target_link_libraries(${target} PRIVATE "-Wl,--no-as-needed" -l:libpthread.so.0 -l:libdl.so.2
      -l:librt.so.1 -l:libm.so.6 "-Wl,--as-needed")
  endforeach()
endfunction()

# `_C` for each of SPARSE_FMHA_PYTHONS, besides the one that builds. The op library serves all.
# Sets `out` to their targets.
function(add_extensions_of_other_pythons out)
  set(targets "")
  foreach(python IN LISTS SPARSE_FMHA_PYTHONS)
    execute_process(
      COMMAND "${python}" -c "import sysconfig as s; print(s.get_path('include'), \
s.get_config_var('EXT_SUFFIX'), s.get_config_var('SOABI').replace('-', '_'), sep=';')"
      OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    list(GET found 0 include)
    list(GET found 1 suffix)
    list(GET found 2 name)
    if(suffix STREQUAL "${PYTHON_MODULE_EXTENSION}")
      continue()  # the one that builds
    endif()
    set(target _C_${name})
    add_library(${target} MODULE ${bindings_sources})
    set_target_properties(${target} PROPERTIES OUTPUT_NAME _C PREFIX "" SUFFIX "${suffix}")
    target_include_directories(${target} SYSTEM PRIVATE "${include}")
    target_link_libraries(${target} PRIVATE pybind11::headers)
    list(APPEND targets ${target})
  endforeach()
  set(${out} ${targets} PARENT_SCOPE)
endfunction()
