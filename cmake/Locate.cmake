# Packages of the Python environment that the build takes headers from; tools/locate.py knows where.
function(locate what out)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/locate.py" "${what}"
    OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${reason}")
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

locate(torch TORCH_DIR)
locate(pybind11 PYBIND11_DIR)
file(STRINGS "${TORCH_DIR}/version.py" torch_version_line REGEX "^__version__")
string(REGEX REPLACE ".*['\"](.+)['\"]" "\\1" TORCH_VERSION "${torch_version_line}")
message(STATUS "torch ${TORCH_VERSION}: ${TORCH_DIR}")
