"""Finds the GPUs of this machine and chooses what `make demo` builds for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import locate

# One line for each GPU: name, compute capability.
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
TORCH = """import torch
for n in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(n)
    print(f"{p.name}, {p.major}.{p.minor}")
"""

HAS_CUDA = "import sys, torch; sys.exit(torch.version.cuda is None)"


def seen(python: Path) -> dict[str, str]:
    """Compute capabilities (such as 9.0) by GPU name, from nvidia-smi or else torch of `python`."""
    for command in (NVIDIA_SMI, (str(python), "-c", TORCH)):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0:
            return dict(line.rsplit(", ", 1) for line in done.stdout.splitlines() if ", " in line)
    return {}


def choose(python: Path) -> tuple[str, str]:
    """Chooses SPARSE_FMHA_ARCHS so that a build has only kernels that this machine can run.

    Args:
        python: an interpreter with torch, used if there is no nvidia-smi.

    Returns:
        The value, and a line that states and explains it.

    Raises:
        LookupError: SPARSE_FMHA_ARCHS is set, but cannot be built.
    """
    wanted = os.environ.get("SPARSE_FMHA_ARCHS", "")
    buildable, reason = locate.archs()
    if wanted:
        what = f"GPU kernels for {', '.join(buildable)}" if buildable else "CPU ops alone"
        return wanted, f"{what}, as SPARSE_FMHA_ARCHS={wanted} asks"
    found = seen(python)
    ask = f"; SPARSE_FMHA_ARCHS={','.join(buildable)} builds the GPU kernels all the same"
    ask = ask if buildable else ""
    if not found:
        return "none", f"CPU ops alone: no GPU is seen here{ask}"
    names = ", ".join(f"{name} (compute capability {cap})" for name, cap in found.items())
    runs = [arch for arch, runs_on in locate.ARCHS.items() if set(runs_on) & set(found.values())]
    if not runs:
        supported = ", ".join(gpu for runs_on in locate.ARCHS.values() for gpu in runs_on)
        return "none", f"CPU ops alone: {names} is not supported; supported are {supported}{ask}"
    if not buildable:
        return "none", f"CPU ops alone, though there is {names}: {reason}"
    line = f"GPU kernels for {', '.join(runs)}: {names}; minutes on 16 cores, half an hour on two"
    if subprocess.run([python, "-c", HAS_CUDA], capture_output=True).returncode:
        line += ". The torch here is a CPU build, which cannot run them: TORCH chooses another"
    return ",".join(runs), line
