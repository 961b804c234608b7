#include "sparse_fmha/core/images.h"

#include <algorithm>
#include <cctype>
#include <sstream>

namespace sparse_fmha {
namespace {

constexpr char kPtx[] = "compute_";

bool is_ptx(std::string const& image) { return image.rfind(kPtx, 0) == 0; }

// An image is named by ten times the major and the minor compute capability, and a letter if other
// GPUs cannot run it.
struct Target {
  int capability;
  char letter;  // 'a': of this GPU alone; 'f': of its family; 0: also of later minor ones
};
Target target_of(std::string const& image) {
  std::string const number = is_ptx(image) ? image.substr(sizeof(kPtx) - 1) : image;
  char const last = number.empty() ? '0' : number.back();
  return {std::atoi(number.c_str()), std::isdigit(last) ? char{0} : last};
}

// The kernels of sm90 are built for Hopper alone, and all others from the PTX of compute_80.
bool is_of(std::string const& image, Arch arch) {
  return (target_of(image).letter != 0) == (arch == Arch::kSm90);
}

bool runs_code(std::string const& image, Gpu const& gpu) {
  Target const target = target_of(image);
  int const capability = 10 * gpu.major + gpu.minor;
  return target.letter == 'a'
             ? target.capability == capability
             : target.capability / 10 == gpu.major && target.capability <= capability;
}

// A driver compiles the PTX of its own CUDA and of earlier ones. CUDA 12.6 writes that of 12.5.
bool compiles(Gpu const& gpu, int toolkit) {
  int const version = toolkit / 10 * 10;
  return gpu.driver >= (version == 12060 ? 12050 : version);
}

template <class Items, class Name>
std::string joined(Items const& items, Name name) {
  std::string list;
  for (auto const& item : items) {
    list += (list.empty() ? "" : ", ") + name(item);
  }
  return list.empty() ? "none" : list;
}

std::string name_of_image(std::string const& image) {
  return (is_ptx(image) ? "PTX of " : "code for ") + image;
}

}  // namespace

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string list_images(Build const& build) { return joined(build.images, name_of_image); }

std::string why_no_image(Build const& build, Arch arch, Gpu const& gpu) {
  std::ostringstream message;
  message << gpu.name << ", compute capability " << gpu.major << "." << gpu.minor
          << ", needs kernels of " << to_string(arch) << ", and this build has ";
  auto const& archs = build.archs;
  GpuArch const* const row = gpu_arch_of(arch);
  std::string const nvcc_name = row == nullptr ? "none" : row->nvcc;
  if (std::find(archs.begin(), archs.end(), nvcc_name) == archs.end()) {
    message << "none: it is for "
            << joined(archs,
                      [](std::string const& name) {
                        for (GpuArch const& row : kGpuArchs) {
                          if (name == row.nvcc) {
                            return std::string(row.name);
                          }
                        }
                        return name;
                      })
            << ". Build with " << nvcc_name
            << " in SPARSE_FMHA_ARCHS, or move the tensors to the CPU";
    return message.str();
  }
  std::vector<std::string> images;
  std::copy_if(build.images.begin(), build.images.end(), std::back_inserter(images),
               [&](std::string const& image) { return is_of(image, arch); });
  bool ptx = false;
  for (std::string const& image : images) {
    int const capability = 10 * gpu.major + gpu.minor;
    bool const fits = is_ptx(image) && target_of(image).capability <= capability;
    if (is_ptx(image) ? fits && compiles(gpu, build.toolkit) : runs_code(image, gpu)) {
      return "";
    }
    ptx |= fits;
  }
  message << "them as " << joined(images, name_of_image) << ", none of which it runs. ";
  if (ptx) {
    std::string const toolkit = cuda_version(build.toolkit);
    message << "Its driver knows CUDA up to " << cuda_version(gpu.driver)
            << ", and compiles no PTX of CUDA " << toolkit << ". Install a driver of CUDA "
            << toolkit << " or later, or build";
  } else {
    message << "Build";
  }
  message << " with " << gpu.major << gpu.minor << " in SPARSE_FMHA_IMAGES";
  return message.str();
}

// By CMakeLists.txt.
Build const& this_build() {
  static Build const build = [] {
    auto const words = [](char const* text) {
      std::istringstream stream(text);
      std::vector<std::string> list;
      for (std::string word; stream >> word;) {
        list.push_back(word);
      }
      return list;
    };
    return Build{words(SPARSE_FMHA_BUILT_ARCHS), words(SPARSE_FMHA_BUILT_IMAGES),
                 SPARSE_FMHA_BUILT_TOOLKIT};
  }();
  return build;
}

}  // namespace sparse_fmha
