"""What the numbers were measured on: the commit, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import report

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "triton",
    "fa3-fwd",
    "flash-attn-3",
    "fastvideo-kernel",
    "flashinfer-python",
    "sparse-fmha",
    "nvidia-cudnn-cu13",
)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict:
    """SPARSE_FMHA_COMMIT, as `git describe --always --dirty --abbrev=40` prints it, stands in for
    git where only the files were copied."""
    text = os.environ.get("SPARSE_FMHA_COMMIT") or _output(
        "git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    )
    if not text:
        return {"commit": None, "dirty": None}
    return {"commit": text.removesuffix("-dirty"), "dirty": text.endswith("-dirty")}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def nvidia_smi(*fields: str) -> list[str] | None:
    """What the driver says of the first GPU; None where it cannot be asked."""
    query = _output(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"
    )
    return [x.strip() for x in query.split(",")] if query else None


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {"torch": torch.__version__}  # the package's own version may lack the build's variant
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def device(kind: str) -> dict:
    if kind == "cpu":
        return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    said = nvidia_smi("driver_version", "power.limit", "clocks.max.sm")
    driver, watts, mhz = said or (None,) * 3
    return {
        "type": "cuda", "name": properties.name, "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory,
        "driver": driver, "power_limit_w": watts, "max_sm_mhz": mhz,
    }  # fmt: skip


def of_study(tiny: bool) -> tuple[str, torch.dtype]:
    """The device and dtype that a study runs on; without a GPU only its tiny size runs."""
    gpu = torch.cuda.is_available()
    if not tiny and not gpu:
        sys.exit("error: torch finds no GPU; --tiny runs on the CPU")
    return ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)


def describe(kind: str) -> dict:
    return commit() | {
        "device": device(kind),
        "versions": {"python": platform.python_version()} | versions(),
    }


def results(kind: str, **rest: object) -> dict:
    """What a run on this type of device keeps; `rest` is what it sets and measures."""
    return report.stamp() | describe(kind) | rest
