#include "bad_access.h"

#include <unistd.h>
#include <csignal>
#include <cstdio>

#include "program.h"

namespace emulator {
namespace {

struct sigaction before;
Code const* volatile code = nullptr;
int32_t const* volatile pc = nullptr;

void report(int, siginfo_t* info, void*) {
  if (code != nullptr) {
    char text[512];
    int const length =
        std::snprintf(text, sizeof(text), "emulator: kernel %.300s, PTX line %d: no memory at %p\n",
                      code->name.c_str(), code->instructions[*pc].line, info->si_addr);
    [[maybe_unused]] ssize_t const written =
        write(STDERR_FILENO, text, static_cast<size_t>(length));
  }
  sigaction(SIGSEGV, &before, nullptr);  // the access is repeated, and ends the process
}

}  // namespace

BadAccessReport::BadAccessReport() {
  struct sigaction action = {};
  action.sa_sigaction = report;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &before);
}

BadAccessReport::~BadAccessReport() {
  sigaction(SIGSEGV, &before, nullptr);
  code = nullptr;
}

void report_place(Code const* current, int32_t const* at) {
  pc = at;
  code = current;
}

}  // namespace emulator
