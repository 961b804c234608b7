# What the build takes from its surroundings; tools/locate.py knows where to look.

# Sets `out`. When there is nothing: fatal, or, given a third name, that gets the reason.
function(locate what out)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/locate.py" "${what}"
    OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(status EQUAL 0)
    set(${out} "${found}" PARENT_SCOPE)
  elseif(ARGC GREATER 2)
    set(${out} "" PARENT_SCOPE)
    set(${ARGV2} "${reason}" PARENT_SCOPE)
  else()
    message(FATAL_ERROR "${reason}")
  endif()
endfunction()

locate(torch TORCH_DIR)
locate(pybind11 pybind11_DIR)
file(STRINGS "${TORCH_DIR}/version.py" torch_version_line REGEX "^__version__")
string(REGEX REPLACE ".*['\"](.+)['\"]" "\\1" TORCH_VERSION "${torch_version_line}")
message(STATUS "torch ${TORCH_VERSION}: ${TORCH_DIR}")
