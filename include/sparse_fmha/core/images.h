// Whether the library has code that a GPU runs, decided by its build before anything is launched.
#pragma once

#include <string>
#include <vector>

#include "sparse_fmha/core/arch.h"

namespace sparse_fmha {

// What was compiled into a library.
struct Build {
  std::vector<std::string> archs;   // as in SPARSE_FMHA_ARCHS
  std::vector<std::string> images;  // "90a": machine code for this GPU; "compute_80": PTX
  int toolkit;                      // of the PTX, as CUDA counts: 13010 is CUDA 13.1
};
Build const& this_build();

// A GPU and its driver.
struct Gpu {
  std::string name;  // for messages
  int major;
  int minor;
  int driver;  // the newest CUDA that it knows, as CUDA counts; 0: there is none
};

// Why a GPU cannot run what a build has of an architecture, and what to install or build; empty if
// it can.
std::string why_no_image(Build const& build, Arch arch, Gpu const& gpu);

// The images of a build, for messages.
std::string list_images(Build const& build);

// Such as "13.1".
std::string cuda_version(int version);

}  // namespace sparse_fmha
