#pragma once

#include "warp.h"

namespace emulator {

// While it lives, an access of a kernel to memory that the process does not have is reported with
// its instruction before the process ends.
class BadAccessReport {
 public:
  BadAccessReport();
  ~BadAccessReport();
  BadAccessReport(BadAccessReport const&) = delete;
  BadAccessReport& operator=(BadAccessReport const&) = delete;
};

// The place of the instruction under way, for the report.
void report_place(Code const* code, int32_t const* pc);

}  // namespace emulator
