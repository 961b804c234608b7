"""The package as a kernel repository, loaded in a process that has no other sparse_fmha."""

import json
import os
import subprocess
import sys

import pytest

import sparse_fmha
from sparse_fmha.integrations import hub

USE = """
import torch
q = torch.randn(1, 40, 2, 16)
expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
torch.testing.assert_close(loaded.attention(q, q, q), expected.transpose(1, 2))
import importlib.metadata
import sparse_fmha
assert sparse_fmha.__file__.startswith(root), sparse_fmha.__file__
place = str(importlib.metadata.distribution("sparse-fmha").locate_file(""))
assert place.startswith(root), place
"""
BY_HAND = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("loaded", sys.argv[2])
loaded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loaded)
"""
BY_KERNELS = """
import pathlib, sys, kernels
root = sys.argv[1]
loaded = kernels.get_local_kernel(pathlib.Path(root), backend="cpu")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return hub.write_kernel(tmp_path_factory.mktemp("hub") / "kernel")


def run(code, *arguments):
    given = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=given, capture_output=True, text=True)


def test_the_layout(root):
    variants = sorted(folder.name for folder in (root / "build").iterdir())
    assert len(variants) == 1 + bool(sparse_fmha.build_info()["cuda"])
    assert variants[0].startswith("torch-stable-abi210-c")
    ids = set()
    for folder in (root / "build").iterdir():
        metadata = json.loads((folder / "metadata.json").read_text())
        ids.add(metadata["id"])
        name = folder.name.split("-")[3]
        assert metadata["backend"]["type"] == ("cpu" if name == "cpu" else "cuda")
        assert (folder / "sparse_fmha" / "libsparse_fmha.so").exists()
    assert len(ids) == len(variants)


def test_a_process_without_the_package(root):
    (variant,) = (root / "build").glob("*-cpu-*")
    done = run(BY_HAND + USE, root, variant / "__init__.py")
    assert done.returncode == 0, done.stderr


def test_the_package_kernels_loads_it(root):
    pytest.importorskip("kernels")
    done = run(BY_KERNELS + USE, root)
    assert done.returncode == 0, done.stderr


def test_another_version_is_an_error(root):
    (variant,) = (root / "build").glob("*-cpu-*")
    other = "import sys, types\nsys.modules['sparse_fmha'] = types.SimpleNamespace("
    other += "__version__='0.0.1', __all__=[])\n"
    done = run(other + BY_HAND, root, variant / "__init__.py")
    assert "another version of sparse_fmha was imported before, 0.0.1" in done.stderr
