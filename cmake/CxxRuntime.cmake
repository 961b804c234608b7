# One C++ runtime in the process. torch brings libstdc++.so.6. A toolchain that has libstdc++ as a
# static library alone would link a second copy, which shares the ids of locale facets with the
# first: the first number written to a stream, as in an error message, crashes.
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_LINK_OPTIONS -l:libstdc++.so.6)
check_cxx_source_compiles("int main() { return 0; }" HAS_SHARED_LIBSTDCXX)
unset(CMAKE_REQUIRED_LINK_OPTIONS)

function(link_cxx_runtime)
  if(HAS_SHARED_LIBSTDCXX)
    foreach(target IN LISTS ARGN)
      target_link_libraries(${target} PRIVATE -l:libstdc++.so.6)
    endforeach()
  endif()
endfunction()
