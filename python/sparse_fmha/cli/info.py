"""What is installed and what it can run: `sparse-fmha info`."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

import sparse_fmha
from sparse_fmha._build import BuildInfo, KernelRow


def report(with_kernels: bool = False) -> str:
    """Returns the versions, what each device can run, and one line per problem.

    Args:
        with_kernels: include the whole table of compiled kernels.
    """
    build = sparse_fmha.build_info()
    versions = (
        f"sparse_fmha {sparse_fmha.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    )
    lines = [
        versions,
        f"built with {', '.join(built_with(build)) or 'unknown tools'}",
        *would_run(),
    ]
    if build.get("images"):
        lines.append(f"GPU code: {', '.join(build['images'])} by CUDA {build['cuda']}; {driver()}")
    if not torch.cuda.is_available():
        lines.append(f"no GPU: {no_gpu()}")
    lines.append(compiled() if with_kernels else f"{compiled()}; --kernels lists them")
    lines += [f"problem: {problem}" for problem in problems()] or ["no problems"]
    if with_kernels:
        lines += ["", "kernels (a tile of 0 is chosen at run time):", str(sparse_fmha.kernels())]
    return "\n".join(lines)


def compiled() -> str:
    """The number of kernels for each architecture."""
    counts = Counter(row["arch"] for row in sparse_fmha.kernels())
    return "kernels: " + (", ".join(f"{n} for {arch}" for arch, n in counts.items()) or "none")


def built_with(build: BuildInfo) -> Iterable[str]:
    versions = {
        "": build.get("compiler"),
        "torch ": build.get("torch"),
        "CUDA ": build.get("cuda"),
        "CUTLASS ": build.get("cutlass"),
    }
    for prefix, version in versions.items():
        if version:
            yield f"{prefix}{version}"
    if build.get("cpu_isas"):
        yield f"CPU code for {', '.join(build['cpu_isas'])}"


def devices() -> dict[str, str]:
    """A description of every device, by its name in torch."""
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    return found


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_archs() -> dict[str, list[tuple[int, int]]]:
    """The compute capabilities that each GPU architecture of the kernel table runs on."""
    from sparse_fmha._extension import _C

    return _C.gpu_archs()


def rows_for(device: str) -> list[KernelRow]:
    """The rows of the kernel table that run on a device."""
    gpus = gpu_archs()

    def runs(arch: str) -> bool:
        if device == "cpu":
            return arch == "cpu"
        return torch.cuda.get_device_capability(device) in gpus.get(arch, ())

    return [row for row in sparse_fmha.kernels() if runs(row["arch"])]


def would_run() -> list[str]:
    """The kernels that the library has for each device here."""
    lines = []
    for device, text in devices().items():
        dtypes: dict[str, list[str]] = {}
        for row in rows_for(device):
            dtypes.setdefault(row["mechanism"], []).append(row["dtype"])
        mechanisms: dict[str, list[str]] = {}
        for mechanism, names in dtypes.items():
            mechanisms.setdefault(", ".join(dict.fromkeys(names)), []).append(mechanism)
        kernels = "; ".join(f"{', '.join(of)} in {names}" for names, of in mechanisms.items())
        lines.append(f"{device}: {text}: {kernels or 'no kernel'}")
    return lines


def problems() -> list[str]:
    """The reasons why a device or a compiled kernel cannot be used, one line each."""
    found = []
    archs = sorted({row["arch"] for row in sparse_fmha.kernels()})
    if "cpu" not in archs:
        found.append("cpu: no kernel was compiled for it")
    if set(archs) & set(gpu_archs()) and not torch.cuda.is_available():
        found.append(f"cuda: GPU kernels are compiled in, but {no_gpu()}")
    for device in filter(lambda name: name.startswith("cuda:"), devices()):
        rows = rows_for(device)
        if not rows:
            found.append(f"{device}: no kernel for it; compiled for {', '.join(archs)}")
        elif reason := why_no_image(device, rows[0]["arch"]):
            found.append(reason)
        elif status_on(device, rows[0]["arch"]) == "compiled":
            found.append(
                f"{device}: its kernels were never run on such a GPU, so calls raise; "
                "sparse_fmha.allow_untested() says how to use them"
            )
    return found


def why_no_image(device: str, arch: str) -> str:
    """Why a device cannot run what this build has of an architecture; empty if it can."""
    from sparse_fmha._extension import _C

    return _C.why_no_image(arch, device, *torch.cuda.get_device_capability(device))


def driver() -> str:
    """Which CUDA the driver knows."""
    from sparse_fmha._extension import _C

    version = _C.driver_version()
    if not version:
        return "no driver is found"
    return f"the driver knows CUDA up to {version // 1000}.{version % 1000 // 10}"


def status_on(device: str, arch: str) -> str:
    """How far the kernels of an architecture are tested on GPUs like the device."""
    from sparse_fmha._extension import _C

    major, minor = torch.cuda.get_device_capability(device)
    return _C.arch_status(arch)[f"{major}.{minor}"]


def no_gpu() -> str:
    return "torch sees no CUDA device" if torch.version.cuda else "torch is a CPU-only build"
