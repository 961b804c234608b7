#include "check.h"

int main() {
  unit_tests::test_asynchrony();
  unit_tests::test_instructions();
  unit_tests::test_mbarriers();
  unit_tests::test_tensor_maps();
  unit_tests::test_wgmma();
  std::printf("%d failures\n", unit_tests::failures);
  return unit_tests::failures == 0 ? 0 : 1;
}
