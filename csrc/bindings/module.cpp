// `_C`: the host side of the library for Python. It handles no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "sparse_fmha/core/capabilities.h"
#include "sparse_fmha/core/cpu_isa.h"
#include "sparse_fmha/core/images.h"
#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/core/scores.h"
#include "sparse_fmha/cuda/device_arch.h"

namespace py = pybind11;

void bind_walks(py::module_& m);
void bind_tiles(py::module_& m);
void bind_lists(py::module_& m);
void bind_stripes(py::module_& m);
void bind_gathered_keys(py::module_& m);
void bind_transposed_lists(py::module_& m);
void bind_decode(py::module_& m);
void bind_fragments(py::module_& m);
void bind_choose_row(py::module_& m);

namespace {

constexpr char const* kBuildInfo =
#include "build_info.inc"
    ;

py::dict describe(sparse_fmha::KernelInfo const& info) {
  using namespace py::literals;
  return py::dict("name"_a = info.name, "arch"_a = sparse_fmha::to_string(info.key.arch),
                  "pass"_a = sparse_fmha::to_string(info.key.pass), "mechanism"_a = info.mechanism,
                  "dtype"_a = sparse_fmha::to_string(info.key.dtype),
                  "head_dim"_a = info.key.head_dim, "value_dim"_a = info.key.value_dim,
                  "skips"_a = info.key.skips, "key_bias"_a = info.key.key_bias,
                  "packed"_a = info.key.packed, "dilated"_a = info.key.dilated,
                  "tile_q"_a = info.tile_q, "tile_k"_a = info.tile_k, "stages"_a = info.stages,
                  "threads"_a = info.threads, "blocks"_a = info.blocks,
                  "smem_bytes"_a = info.smem_bytes);
}

py::list kernel_table() {
  py::list rows;
  for (sparse_fmha::KernelRow const& row : sparse_fmha::kernel_table()) {
    rows.append(describe(row.info));
  }
  return rows;
}

py::list score_kernel_table() {
  using namespace py::literals;
  py::list rows;
  for (sparse_fmha::ScoreKernels const& row : sparse_fmha::score_kernel_table()) {
    rows.append(py::dict("name"_a = row.name, "arch"_a = sparse_fmha::to_string(row.arch),
                         "dtype"_a = sparse_fmha::to_string(row.dtype),
                         "head_dim"_a = row.head_dim));
  }
  return rows;
}

template <class Enum>
Enum parse(std::string const& name, std::vector<Enum> const& values, char const* argument) {
  std::string allowed;
  for (Enum value : values) {
    if (name == sparse_fmha::to_string(value)) {
      return value;
    }
    allowed += std::string(allowed.empty() ? "" : ", ") + sparse_fmha::to_string(value);
  }
  throw py::value_error(std::string(argument) + " must be one of " + allowed + ", got " + name);
}

int mechanism_index(std::string const& name) {
  for (sparse_fmha::KernelRow const& row : sparse_fmha::kernel_table()) {
    if (row.info.mechanism == name) {
      return row.info.key.mechanism;
    }
  }
  throw py::value_error("mechanism must be one that a kernel has, got " + name);
}

std::vector<sparse_fmha::Arch> gpu_arch_list() {
  std::vector<sparse_fmha::Arch> archs;
  for (sparse_fmha::GpuArch const& row : sparse_fmha::kGpuArchs) {
    archs.push_back(row.arch);
  }
  return archs;
}

py::dict find_kernel(std::string const& arch, std::string const& mechanism,
                     std::string const& dtype, int head_dim, bool skips, std::string const& pass,
                     bool key_bias, int tile_q, bool packed, int value_dim, bool dilated) {
  using sparse_fmha::Arch;
  using sparse_fmha::DataType;
  using sparse_fmha::Pass;
  std::vector<Arch> archs = gpu_arch_list();
  archs.insert(archs.begin(), Arch::kCpu);
  Arch const on = parse(arch, archs, "arch");
  DataType const of = parse<DataType>(
      dtype, {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64},
      "dtype");
  Pass const in = parse<Pass>(
      pass,
      {Pass::kForward, Pass::kBackwardDq, Pass::kBackwardDkv, Pass::kBackwardFused, Pass::kDecode},
      "pass");
  return describe(
      sparse_fmha::find_kernel({on, in, of, head_dim, value_dim == 0 ? head_dim : value_dim,
                                mechanism_index(mechanism), skips, key_bias, packed, dilated},
                               tile_q)
          .info);
}

// Compute capabilities of each architecture.
py::dict gpu_archs() {
  py::dict archs;
  for (sparse_fmha::GpuArch const& row : sparse_fmha::kGpuArchs) {
    py::list capabilities;
    for (sparse_fmha::Capability const& gpu : sparse_fmha::kCapabilities) {
      if (gpu.arch == row.arch && gpu.is_default) {
        capabilities.append(py::make_tuple(gpu.major, gpu.minor));
      }
    }
    archs[row.name] = capabilities;
  }
  return archs;
}

std::string arch_of_capability(int major, int minor) {
  return sparse_fmha::to_string(sparse_fmha::arch_of_capability(major, minor));
}

std::string arch_for_call(int major, int minor) {
  return sparse_fmha::to_string(sparse_fmha::arch_for_call(major, minor));
}

std::optional<std::string> name_of(std::optional<sparse_fmha::Arch> arch) {
  return arch ? std::optional<std::string>(sparse_fmha::to_string(*arch)) : std::nullopt;
}

std::optional<std::string> set_arch_override(std::optional<std::string> const& arch) {
  std::optional<sparse_fmha::Arch> wanted;
  if (arch) {
    wanted = parse(*arch, gpu_arch_list(), "arch");
  }
  return name_of(sparse_fmha::set_arch_override(wanted));
}

// How far the kernels of an architecture are tested, by the compute capability of the device.
py::dict arch_status(std::string const& arch) {
  sparse_fmha::Arch const of = parse(arch, gpu_arch_list(), "arch");
  py::dict status;
  for (sparse_fmha::Capability const& row : sparse_fmha::kCapabilities) {
    if (row.arch == of) {
      std::string const gpu = std::to_string(row.major) + "." + std::to_string(row.minor);
      status[py::str(gpu)] = row.status;
    }
  }
  return status;
}

// The arguments that are not given are those of this build and of the driver here.
std::string why_no_image(std::string const& arch, std::string const& gpu, int major, int minor,
                         std::optional<int> driver,
                         std::optional<std::vector<std::string>> const& archs,
                         std::optional<std::vector<std::string>> const& images,
                         std::optional<int> toolkit) {
  sparse_fmha::Build build = sparse_fmha::this_build();
  build.archs = archs.value_or(build.archs);
  build.images = images.value_or(build.images);
  build.toolkit = toolkit.value_or(build.toolkit);
  return sparse_fmha::why_no_image(
      build, parse(arch, gpu_arch_list(), "arch"),
      {gpu, major, minor, driver.value_or(sparse_fmha::driver_version())});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernel table, build information and tile walks of sparse_fmha.";
  m.def("kernel_table", &kernel_table,
        "Compiled kernels, one dict each; tile sizes in tokens, 0 where chosen at run time.");
  m.def("score_kernel_table", &score_kernel_table,
        "Compiled kernels that reduce scores, one dict each; head_dim is the largest.");
  m.def("find_kernel", &find_kernel, py::arg("arch"), py::arg("mechanism"), py::arg("dtype"),
        py::arg("head_dim"), py::arg("skips") = false, py::arg("pass") = "forward",
        py::arg("key_bias") = false, py::arg("tile_q") = 0, py::arg("packed") = false,
        py::arg("value_dim") = 0, py::arg("dilated") = false,
        "The row that an op takes for this request, of several the one with tile_q, or else that "
        "for much work; RuntimeError names the rows there are. value_dim 0: head_dim.");
  m.def("gpu_archs", &gpu_archs, "Compute capabilities by the GPU architecture that they run.");
  m.def("arch_of_capability", &arch_of_capability, py::arg("major"), py::arg("minor"),
        "The architecture that a GPU runs; RuntimeError names the compute capabilities there are.");
  m.def("arch_for_call", &arch_for_call, py::arg("major"), py::arg("minor"),
        "The same in a call: by the override if there is one; RuntimeError if it is untested.");
  m.def("arch_status", &arch_status, py::arg("arch"),
        "measured, ran or compiled, by compute capability, for a GPU architecture.");
  m.def(
      "arch_override", [] { return name_of(sparse_fmha::arch_override()); },
      "Which architecture all calls on GPUs take; None: by the table.");
  m.def("set_arch_override", &set_arch_override, py::arg("arch"),
        "Which architecture all calls on GPUs take; None: by the table. Returns the one before.");
  m.def("cpu_isas", &sparse_fmha::cpu_isas,
        "Instruction sets of this CPU that there is code for, from the lowest.");
  m.def("set_cpu_isa", &sparse_fmha::set_cpu_isa, py::arg("name"),
        "Limits CPU calls to a set and those below it. Returns the one before; ValueError names "
        "the sets of this CPU.");
  m.def("allow_untested", &sparse_fmha::allow_untested, py::arg("allow"),
        "Whether calls may take kernels that were never run on their device.");
  m.def("why_no_image", &why_no_image, py::arg("arch"), py::arg("gpu"), py::arg("major"),
        py::arg("minor"), py::arg("driver") = py::none(), py::arg("archs") = py::none(),
        py::arg("images") = py::none(), py::arg("toolkit") = py::none(),
        "Why a GPU cannot run what this build has of an architecture, and what to do; else empty. "
        "CUDA versions are whole numbers: 13010 is 13.1.");
  m.def("driver_version", &sparse_fmha::driver_version,
        "The newest CUDA that the driver knows, such as 13010; 0 without one.");
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
      "Versions of what the library was built with, and the ptxas figures of every GPU kernel.");
  bind_walks(m);
  bind_tiles(m);
  bind_lists(m);
  bind_stripes(m);
  bind_gathered_keys(m);
  bind_transposed_lists(m);
  bind_decode(m);
  bind_fragments(m);
  bind_choose_row(m);
}
