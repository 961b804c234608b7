"""PTX that the driver compiles, as on a GPU for which the library has no machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import other_archs
import pytest
import torch

import sparse_fmha

pytestmark = pytest.mark.gpu

PROGRAM = Path(__file__).with_name("driver_compiled.py")
ERROR = 2e-3  # of fp16, relative to the largest element


@pytest.mark.parametrize("arch", sorted(other_archs.LACKING))
def test_kernels_that_the_driver_compiles(cuda, arch):
    """All of the library's kernels of that architecture; the driver ignores machine code."""
    if arch not in {row["arch"] for row in sparse_fmha.kernels()}:
        pytest.skip(f"this build has no kernels of {arch}")
    environment = {name: x for name, x in os.environ.items() if name != other_archs.VARIABLE}
    package = str(Path(sparse_fmha.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    environment |= {"CUDA_FORCE_PTX_JIT": "1", "CUDA_CACHE_DISABLE": "1"}
    command = [sys.executable, str(PROGRAM), arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    own = errors.pop("own", None)
    assert set(errors) == {
        "dense", "neighborhood", "block_lists", "stripes", "decode", "gradients",
    }  # fmt: skip
    assert {name: x for name, x in errors.items() if not x <= ERROR} == {}
    if torch.cuda.get_device_capability() == (9, 0):  # or the variable had no effect
        assert own, "Hopper's kernels have no PTX, and ran"
