"""Enabled models in diffusers' context and tensor parallelism, in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("diffusers.hooks.tensor_parallel")  # diffusers 0.42
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

import parallel_diffusion


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder with what each rank says of each case."""
    folder, script = tmp_path_factory.mktemp("ranks"), Path(parallel_diffusion.__file__)
    paths = [str(script.parent), *sys.path]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
             "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder],
            env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(parallel_diffusion.WORLD)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), told[0][-2000:]
    return folder


@pytest.mark.parametrize("name", parallel_diffusion.CASES)
def test_case(outcome, name):
    for rank in range(parallel_diffusion.WORLD):
        assert (outcome / f"{name} {rank}").read_text() == "passed"
