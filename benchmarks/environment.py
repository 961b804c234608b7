"""What the numbers were measured on: the commit, the machine, the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.peers import versions

ROOT = Path(__file__).resolve().parent.parent


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


def device(kind: str) -> dict:
    if kind == "cpu":
        return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    query = _output("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm",
                    "--format=csv,noheader,nounits", "--id=0")  # fmt: skip
    driver, watts, mhz = [x.strip() for x in query.split(",")] if query else (None,) * 3
    return {
        "type": "cuda", "name": properties.name, "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory,
        "driver": driver, "power_limit_w": watts, "max_sm_mhz": mhz,
    }  # fmt: skip


def describe(kind: str) -> dict:
    return commit() | {
        "device": device(kind),
        "versions": {"python": platform.python_version()} | versions(),
    }
