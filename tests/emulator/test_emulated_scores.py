"""Kernels that reduce scores, on the emulator; all of tests/gpu/test_score_sums_gpu.py runs here,
too."""

import pytest
import torch
from poison import poisoned
from score_cases import SHIFTS, built, check, draw, only_kernels

import sparse_fmha
from sparse_fmha import patterns
from sparse_fmha.selection import score_kernels


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


@pytest.mark.parametrize("shift", SHIFTS)
def test_corners_of_tiles(shift):
    q, k = randn(1, 260, 1, 64), randn(1, 260 + shift, 1, 64, seed=1)
    check(q, k, causal=True, sizes=(16, 32))
    check(q, k, causal=True, rows=128)


def test_more_steps_than_are_stored_together():
    check(randn(1, 70, 1, 64), randn(1, 2348, 1, 64, seed=1), causal=True, sizes=(16, 128))


@pytest.mark.parametrize("options", [{}, {"by": "mass", "least": 0.3}, {"scale": -0.2}], ids=str)
@pytest.mark.parametrize("lengths", [(300, 500), (500, 300)])
def test_importance_of_blocks(monkeypatch, options, lengths):
    """PSA's levels by the kernel, and by torch's code; both round sums of bf16 products to fp32."""
    q, k = randn(1, lengths[0], 2, 64), randn(1, lengths[1], 1, 64, seed=1)
    for causal in (False, True):
        found = patterns.psa_levels(q, k, causal=causal, block_q=64, block_kv=64, **options)
        with monkeypatch.context() as patch:
            patch.setattr(score_kernels, "largest_head_dim", lambda *_: 0)
            known = patterns.psa_levels(q, k, causal=causal, block_q=64, block_kv=64, **options)
        assert found.unique().numel() > 1
        assert (found != known).sum() <= 1
