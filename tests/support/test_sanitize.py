"""The problems of tests/gpu/sanitize.py, as far as they can be computed without a GPU."""

import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests/gpu"


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # as the program sets it
    monkeypatch.syspath_prepend(GPU)
    return importlib.import_module("sanitize")


@pytest.mark.parametrize("file", ["tests/gpu/run.sh", "docs/profiling.md"])
def test_every_kernel_is_checked(file):
    """The filter is a part of a mangled name, which begins with the outermost namespace."""
    filters = set(re.findall(r"\bkns=(\w+)", (ROOT / file).read_text()))
    assert len(filters) == 1
    namespace = re.compile(rf"^namespace {filters.pop()}\b", re.MULTILINE)
    sources = [x for folder in ("csrc", "include") for x in (ROOT / folder).rglob("*.*")]
    kernels = {x: x.read_text().partition("__global__") for x in sources}
    found = {x: before for x, (before, name, _) in kernels.items() if name}
    assert len(found) > 10
    assert [x for x, before in found.items() if not namespace.search(before)] == []


@pytest.mark.parametrize("name", ["dense, a scale of 0", "stripes, causal", "2-D, wide"])
def test_gradients_are_within_the_tolerance(sanitize, name):
    """With a scale of 0 the gradient of q is 0, so an error cannot be relative to it."""
    torch.manual_seed(0)
    error = sanitize.backward_error(name, 64, torch.float16, "cpu")
    assert error <= sanitize.TOLERANCE[torch.float16]


def test_a_gradient_of_keys_that_is_wrong_is_found(sanitize, monkeypatch):
    def wrong(self, *given, **options):
        found = backward(self, *given, **options)
        return found | {"k": found["v"], "v": found["k"]}

    case = type(sanitize.LARGE["stripes"])
    backward = case.backward
    monkeypatch.setattr(case, "backward", wrong)
    assert sanitize.backward_error("stripes", 64, torch.float16, "cpu") > 0.1


def problems(sanitize, monkeypatch, error_of):
    monkeypatch.setattr(sanitize, "PROBLEMS", {"one": (error_of, [()])})
    return sanitize.solve(["one"], sanitize.HEAD_DIMS)


def test_what_an_architecture_lacks_is_counted(sanitize, monkeypatch, capsys):
    def skips(head_dim, dtype):
        if head_dim == 64:
            return 0.0
        raise RuntimeError(
            "no kernel for arch=sm80, pass=forward, mechanism=dense, dtype=float16, "
            f"head_dim={head_dim}, with skipping"
        )

    assert problems(sanitize, monkeypatch, skips) == 0
    assert "2 problems, 0 wrong, 6 that the architecture has no kernels for" in (
        capsys.readouterr().out
    )


def test_any_other_error_is_raised(sanitize, monkeypatch):
    def fails(head_dim, dtype):
        raise RuntimeError("no kernel for arch=sm90, pass=decode, mechanism=dense, "
                           "dtype=float16, head_dim=64, with skipping")  # fmt: skip

    with pytest.raises(RuntimeError, match="arch=sm90"):
        problems(sanitize, monkeypatch, fails)


def test_nothing_computed_is_a_failure(sanitize, monkeypatch):
    def lacks(head_dim, dtype):
        raise RuntimeError("no kernel for arch=sm80, pass=forward, mechanism=dense, "
                           "dtype=float16, head_dim=64, with skipping")  # fmt: skip

    assert problems(sanitize, monkeypatch, lacks) == 1
