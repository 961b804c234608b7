"""Kernels that reduce scores, on the emulator; all of tests/gpu/test_score_sums_gpu.py runs here,
too."""

import pytest
import torch
from poison import poisoned
from score_cases import built, check, draw, only_kernels

import sparse_fmha


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    if not built():
        pytest.skip("not built: kernels that reduce scores")
    only_kernels(monkeypatch, emulated=True)
    with sparse_fmha.arch_override("sm90"), poisoned():
        yield


def randn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("seed", range(30))
def test_drawn(seed):
    case = draw(seed, randn)
    check(**case, shapes=[list(case[name].shape) for name in "qk"])


def test_more_steps_than_are_stored_together():
    check(randn(1, 70, 1, 64), randn(1, 2348, 1, 64, seed=1), causal=True, sizes=(16, 128))
