# What the build takes from its surroundings; tools/locate.py knows where to look.

# Sets `out`; stops where there is nothing.
function(locate what out)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env "SPARSE_FMHA_ARCHS=${SPARSE_FMHA_ARCHS}"
            "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/locate.py" "${what}"
    OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${reason}")
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

locate(torch TORCH_DIR)
locate(pybind11 pybind11_DIR)
file(STRINGS "${TORCH_DIR}/version.py" torch_version_line REGEX "^__version__")
string(REGEX REPLACE ".*['\"](.+)['\"]" "\\1" TORCH_VERSION "${torch_version_line}")
message(STATUS "torch ${TORCH_VERSION}: ${TORCH_DIR}")
