"""Reads the tables of GPU architectures and devices, include/sparse_fmha/core/*.def."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CORE = Path(__file__).resolve().parent.parent / "include/sparse_fmha/core"


class GpuArch(NamedTuple):
    enumerator: str  # kSm90
    name: str  # sm90, in kernel names
    nvcc: str  # 90a, in SPARSE_FMHA_ARCHS
    family: str  # sm90, folder and namespace of its kernels' code
    capabilities: tuple[str, ...]  # such as 9.0, of the devices that run its kernels


def read() -> list[GpuArch]:
    archs = re.findall(
        r"^SPARSE_FMHA_ARCH\((\w+), (\w+), (\w+), (\w+)\)$", (CORE / "archs.def").read_text(), re.M
    )
    gpus = re.findall(
        r"^SPARSE_FMHA_CAPABILITY\((\d+), (\d+), (\w+), \w+\)$",
        (CORE / "capabilities.def").read_text(),
        re.M,
    )
    return [
        GpuArch(*arch, tuple(f"{major}.{minor}" for major, minor, of in gpus if of == arch[0]))
        for arch in archs
    ]
