// Checks of the unit tests: a failed one is printed, and makes the program fail.
#pragma once

#include <cstdio>

namespace unit_tests {

inline int failures = 0;

inline void check(bool holds, char const* what, char const* file, int line) {
  if (!holds && ++failures <= 20) {
    std::printf("%s:%d: %s does not hold\n", file, line, what);
  }
}

template <class Error, class Body>
bool throws(Body const& body) {
  try {
    body();
  } catch (Error const&) {
    return true;
  }
  return false;
}

void test_asynchrony();
void test_instructions();
void test_mbarriers();
void test_tensor_maps();
void test_wgmma();

}  // namespace unit_tests

#define CHECK(condition) unit_tests::check(condition, #condition, __FILE__, __LINE__)
